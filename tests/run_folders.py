"""A run folder as `peft-mlm train` writes it, from given figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peft_mlm.config import read_arguments, write_arguments, write_sources
from peft_mlm.run_folder import write_json

EVALUATIONS = {4: 1.6, 8: 1.2}
LENGTHS = {"edges": [0, 10, 20, 31], "counts": [10, 25, 5], "median": 14.0}


def figures(loss: float, **more: Any) -> dict[str, Any]:
    """The figures of an evaluation."""
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": math.exp(-loss), "masked_tokens": 123, **more}


def save_run(folder: Path, *, losses: dict[int, float] | None = None, more: Any = None, **arguments: Any) -> Path:
    """Write the files of a finished run that trained a whole model.

    Args:
        folder: The run folder.
        losses: Loss of the evaluation at each step.
        more: What else stands in summary.json.
        **arguments: Arguments of the run that differ.
    """
    folder.mkdir(parents=True)
    losses = EVALUATIONS if losses is None else losses
    text = folder.parent / "letters.txt"
    given = {"model_name_or_path": "org/base", "train_file": [str(text)], "output_dir": str(folder), "seed": 3}
    resolved = read_arguments(values={**given, **arguments})
    write_arguments(resolved, folder / "arguments.yaml")
    write_sources(resolved, folder / "sources.json")
    versions = {"peft-mlm": "0.1.0", "torch": "2.9.9", "bitsandbytes": None}
    environment = {"python": "3.11.1", "device": "cpu", "versions": versions, "commit": "c0ffee" * 6}
    write_json(folder / "environment.json", {**environment, "started": "2026-03-04T05:06:07+00:00"})
    facts = {"source": {"files": [str(text)]}, "texts": 40, "empty": 0, "text_tokens": 600, "unknown_share": 0.0,
             "longest_text": 30, "text_lengths": LENGTHS, "max_seq_length": 16, "rows": 40, "tokens": 590,
             "truncated_texts": 2, "truncated_tokens": 10, "dropped_tokens": 0, "rows_used": 40}  # fmt: skip
    write_json(folder / "dataset.json", {"train": {**facts, "fingerprint": "f" * 32},
                                         "validation": {**facts, "fingerprint": "e" * 32}})  # fmt: skip
    write_json(folder / "summary.json", {"status": "finished", "method": "full", "trainable_parameters": 1000,
                                         "total_parameters": 1000, "quantisation": None, "base": figures(2.0),
                                         "adapted": figures(losses[max(losses)]), "steps": max(losses), "epochs": 2.0,
                                         "train_seconds": 30.5, "seconds": 61.25, "saved_to": str(folder / "model"),
                                         "saved_bytes": 4321, **(more or {})})  # fmt: skip
    lines: list[dict[str, Any]] = []
    for step in range(2, max(losses) + 1, 2):
        lines.append({"step": step, "loss": 2.5 - step / 10, "learning_rate": 3e-4, "grad_norm": 1.5})
        if step in losses:
            scores = {f"eval_{name}": value for name, value in figures(losses[step]).items() if name != "masked_tokens"}
            lines.append({"step": step, **scores})
    lines.append({"step": max(losses), "train_runtime": 30.5, "train_loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
