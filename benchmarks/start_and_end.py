"""Where the time of a short run goes, beside its steps: ours against a plain script of the same libraries.

Sapiens VH learns mouse sequences by LoRA for 20 steps, with an evaluation before, one after, and one checkpoint.

    .venv/bin/python benchmarks/start_and_end.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ASSETS = ROOT / "peft_mlm" / "demo_assets"
STEPS = 20
PHASES = ("imports", "load", "text to rows", "adapter and trainer", "evaluation before", "steps", "after the steps")


def baseline(folder: Path) -> dict[str, float]:
    """The plain script."""
    clock = Clock()
    import datasets
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    clock.lap("imports")
    from benchmarks.loss_curves import sequences
    from benchmarks.works import baseline_rows, baseline_trainer

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "sapiens_vh")
    model = transformers.AutoModelForMaskedLM.from_pretrained(ASSETS / "sapiens_vh")
    clock.lap("load")
    train, unseen = (
        baseline_rows(sequences(f"mouse_{x}"), tokenizer, line_by_line=True) for x in ("train", "validation")
    )
    clock.lap("text to rows")
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = baseline_trainer(model, tokenizer, train, values)
    trainer.eval_dataset = unseen
    clock.lap("adapter and trainer")
    trainer.evaluate()
    clock.lap("evaluation before")
    watch(trainer, clock)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "adapter"))
    clock.lap("after the steps")
    return clock.seconds


def ours(folder: Path) -> dict[str, float]:
    """`peft-mlm train`, watched from outside at its own seams."""
    from peft_mlm.console import quiet_libraries
    from peft_mlm.processor import tune_processor

    quiet_libraries()
    tune_processor()
    clock = Clock()
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from peft_mlm import corpus, trainer
    from peft_mlm.commands import train as command

    clock.lap("imports")
    build_corpus, scores_of = corpus.build_corpus, trainer.scores_of

    def rows(*args: Any, **options: Any) -> Any:
        clock.lap("load")
        made = build_corpus(*args, **options)
        clock.lap("text to rows")
        return made

    before: list[bool] = []

    def scores(*args: Any, **options: Any) -> Any:
        if not before:
            clock.lap("adapter and trainer")
        made = scores_of(*args, **options)
        if not before:
            clock.lap("evaluation before")
            before.append(True)
        return made

    corpus.build_corpus = rows
    trainer.scores_of = scores
    built = trainer.MaskedLMTrainer.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        watch(self, clock)

    trainer.MaskedLMTrainer.__init__ = init  # type: ignore[method-assign]
    germline = ASSETS / "germline"
    command.train(
        {
            "model_name_or_path": str(ASSETS / "sapiens_vh"),
            "train_file": str(germline / "mouse_train.fasta"),
            "validation_file": str(germline / "mouse_validation.fasta"),
            "line_by_line": True,
            "use_lora": True,
            "per_device_train_batch_size": 16,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": STEPS,
            "use_cpu": True,
            "output_dir": str(folder / "run"),
        }
    )
    clock.lap("after the steps")
    return clock.seconds


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap for a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def watch(trainer: Any, clock: Clock) -> None:
    """Let the time between the start of training and the end of its last step count for the steps."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.lap("adapter and trainer")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                clock.lap("steps")

    trainer.add_callback(Laps())


def measured(name: str) -> dict[str, float]:
    """One run in a process of its own."""
    words = [sys.executable, str(Path(__file__)), "--one", name]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("baseline", "ours"))
    given = parser.parse_args()
    if given.one:
        out, sys.stdout = sys.stdout, sys.stderr
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"baseline": baseline, "ours": ours}[given.one](Path(folder))), file=out)
        return
    from peft_mlm.run_folder import describe_environment

    seen: dict[str, list[dict[str, float]]] = {"baseline": [], "ours": []}
    for _ in range(given.rounds):
        for name, runs in seen.items():
            runs.append(measured(name))
    medians = {
        name: {phase: statistics.median(run[phase] for run in runs) for phase in PHASES} for name, runs in seen.items()
    }
    record = {
        "environment": describe_environment("cpu"),
        "rows": [{"name": n, "seconds": s} for n, s in medians.items()],
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "start_and_end.json").write_text(json.dumps(record, indent=2) + "\n")
    print("| seconds | " + " | ".join(PHASES) + " | whole |\n| --- |" + " --- |" * (len(PHASES) + 1))
    for name, seconds in medians.items():
        cells = [f"{seconds[phase]:.2f}" for phase in PHASES]
        print(f"| {name} | " + " | ".join(cells) + f" | {sum(seconds.values()):.2f} |")


if __name__ == "__main__":
    main()
