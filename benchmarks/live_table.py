"""What the table on the terminal costs: training with it by training without it, in turns, in one process.

    python benchmarks/live_table.py [--steps 100] [--rounds 3]

stderr is a pseudo-terminal that a thread reads, as a terminal would. Sapiens VH and the demo's text: steps of tens of
milliseconds, so that what is done beside them shows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import peft_mlm
from peft_mlm.console import quiet_libraries
from peft_mlm.processor import tune_processor

ASSETS = Path(peft_mlm.__file__).parent / "demo_assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    quiet_libraries()
    tune_processor()
    master, slave = pty.openpty()
    drawn = [0]

    def follow() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                drawn[0] += data.count(b"steps")

    threading.Thread(target=follow, daemon=True).start()
    os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    print("round, milliseconds per step without and with the table, ratio, drawings")
    ratios = []
    with tempfile.TemporaryDirectory() as folder, os.fdopen(slave, "w", buffering=1) as terminal:
        train(Path(folder) / "warm", 5, shown=False)
        for number in range(given.rounds):
            seconds = {}
            drawn[0] = 0
            for shown in (False, True) if number % 2 else (True, False):
                with contextlib.redirect_stderr(terminal):
                    seconds[shown] = train(Path(folder) / f"{number}{shown}", given.steps, shown=shown)
            ratios.append(seconds[True] / seconds[False])
            without, with_table = (1000 * seconds[shown] / given.steps for shown in (False, True))
            print(f"{number}, {without:.1f}, {with_table:.1f}, {ratios[-1]:.3f}, {drawn[0]}", flush=True)
    print(f"with the table / without: {statistics.median(ratios):.3f} (median)", file=sys.stdout)


def train(folder: Path, steps: int, *, shown: bool) -> float:
    """Seconds of the training loop."""
    result = peft_mlm.train(
        {
            "model_name_or_path": str(ASSETS / "sapiens_vh"),
            "train_file": str(ASSETS / "germline" / "mouse_train.fasta"),
            "output_dir": str(folder),
            "rows": "line",
            "use_lora": True,
            "max_steps": steps,
            "do_eval": False,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": not shown,
        }
    )
    return float(result.metrics["train_seconds"])


if __name__ == "__main__":
    main()
