"""Training, preprocessing and evaluation, ours against what people run today.

The baseline is written on the libraries' own parts: run_mlm's preprocessing, DataCollatorForLanguageModeling, Trainer
and get_peft_model. Text, model, adapter, batch, precision and seeds are the same. Each way of working has a process of
its own, so that its peak memory and its settings are its own; the processes take turns (A B C A B C), one works at a
time, and medians of the turns are compared.

    .venv/bin/python benchmarks/against_run_mlm.py [--works line,packed,...] [--steps 8] [--rounds 3]

Models have the sizes of published ones and random weights; the text is made here, with the word frequencies of real
text. Useful tokens are those of the texts: special tokens and padding count in none. Step memory is the peak of the
process less what it held when model and trainer were built.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.works import VARIANTS, WORKS  # noqa: E402


class Worker:
    """A process that does one kind of work in one way, a turn whenever it is told to."""

    def __init__(self, name: str, variant: str, steps: int) -> None:
        words = [sys.executable, "-m", "benchmarks.works", name, variant, str(steps)]
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.turns: list[dict[str, float]] = []

    def wait(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(self.process.communicate()[1])

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self.wait())

    def close(self) -> dict[str, float]:
        self.process.communicate()
        return {key: statistics.median(one[key] for one in self.turns) for key in self.turns[0]}


def compare(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Let the variants take turns, and give the medians with their ratios to the baseline."""
    work = WORKS[name]
    variants = VARIANTS if work.kind == "train" else VARIANTS[:2]
    workers = {variant: Worker(name, variant, steps) for variant in variants}
    for worker in workers.values():
        worker.wait()
    for _ in range(rounds):
        for worker in workers.values():
            worker.turn()
    figures = {variant: worker.close() for variant, worker in workers.items()}
    row = {"name": work.what, **ratios(figures), "variants": figures}
    print(json.dumps(row), file=sys.stderr)
    return row


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Divide ours by the baseline."""
    baseline, ours, *same = (figures[variant] for variant in VARIANTS if variant in figures)
    return {
        "ratio": ours["tokens_per_second"] / baseline["tokens_per_second"],
        "ratio_same_dropout": same[0]["tokens_per_second"] / baseline["tokens_per_second"] if same else None,
        "step_memory_ratio": ours["step_bytes"] / max(1.0, baseline["step_bytes"]),
    }


def matmul_peak() -> float:
    """Floating-point operations per second of the best of some products of large float32 matrices."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (2048, 768, 3072), (2048, 384, 1536)):
        a, b = torch.randn(rows, inner), torch.randn(columns, inner)
        torch.nn.functional.linear(a, b)
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, b)
        best = max(best, 20 * rows * inner * columns / (time.perf_counter() - started))
    return best


def table(record: dict[str, Any]) -> str:
    """Render the record as Markdown."""
    made = record["environment"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "peft", "datasets"))
    lines = [
        f"{versions}, Python {made['python']}; {record['processor']}, {os.cpu_count()} cores; commit {made['commit']}",
        "",
        f"Best matrix product: {record['matmul_peak'] / 1e9:,.0f} GFLOP/s (float32).",
        "",
        "| work | ÷ baseline | the same dropout | step memory | tokens/s: baseline | ours | same dropout "
        "| step MB: baseline | ours | of the matmul peak: baseline | ours |",
        "| --- |" + " --- |" * 10,
    ]
    for row in record["rows"]:
        baseline, ours, same = (row["variants"].get(variant, {}) for variant in VARIANTS)
        peak = [
            f"{one['useful_flops'] / record['matmul_peak']:.0%}" if "useful_flops" in one else ""
            for one in (baseline, ours)
        ]
        cells = [
            row["name"],
            f"{row['ratio']:.2f}×",
            f"{row['ratio_same_dropout']:.2f}×" if row["ratio_same_dropout"] else "",
            f"{row['step_memory_ratio']:.2f}×",
            f"{baseline['tokens_per_second']:,.0f}",
            f"{ours['tokens_per_second']:,.0f}",
            f"{same['tokens_per_second']:,.0f}" if same else "",
            f"{baseline['step_bytes'] / 1e6:,.0f}",
            f"{ours['step_bytes'] / 1e6:,.0f}",
            *peak,
        ]
        lines.append("| " + " | ".join(cells) + " |")
        for variant, figures in row["variants"].items():
            lines += _remarks(variant, figures)
    return "\n".join(lines)


def _remarks(variant: str, figures: dict[str, float]) -> list[str]:
    """What is told of a way of working below the table's line."""
    if "times_the_raw_tokenizer" in figures:
        return [
            f"| &nbsp; {variant}: {figures['times_the_raw_tokenizer']:.2f} times the raw tokenizer's own time; "
            f"memory with four times the text {figures['step_bytes_of_four'] / 1e6:,.0f} MB |" + " |" * 10
        ]
    if "step_bytes_of_four" in figures:
        return [
            f"| &nbsp; {variant}: memory with four times the rows {figures['step_bytes_of_four'] / 1e6:,.0f} MB |"
            + " |" * 10
        ]
    return []


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from peft_mlm.run_folder import describe_environment

    rows = [compare(name, given.steps, given.rounds) for name in given.works.split(",")]
    record = {
        "environment": describe_environment("cpu"),
        "processor": processor(),
        "matmul_peak": matmul_peak(),
        "rows": rows,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "against_run_mlm.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
