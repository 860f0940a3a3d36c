"""Train two adapters on the shipped antibody model, combine them in all ways, and print the table of docs/combining.md.

The base is Sapiens VH. One adapter learns mouse germline sequences, the other 800 of the human ones; both are measured
on mouse genes that are not among those trained on, and on the other 208 human sequences. About 2 minutes on one core.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft_mlm
from peft_mlm.commands.demo import HUMAN, SHIPPED, config_file
from peft_mlm.console import quiet_libraries

BASE, MOUSE = SHIPPED["model_name_or_path"], SHIPPED["validation_file"]
WAYS: dict[str, dict[str, Any]] = {
    "`cat`, weights 0.5, 0.5": {},
    "`cat`, weights 1, 1": {"weights": [1, 1]},
    "`svd`, rank 8, weights 0.5, 0.5": {"rank": 8},
    "`magnitude_prune`, density 0.2, weights 0.5, 0.5": {"method": "magnitude_prune"},
    "`ties`, density 0.2, weights 1, 1": {"method": "ties"},
    "`ties`, density 0.5, weights 1, 1": {"method": "ties", "density": 0.5},
    "`dare_linear`, density 0.5, weights 0.5, 0.5": {"method": "dare_linear"},
    "`dare_ties`, density 0.5, weights 1, 1": {"method": "dare_ties"},
}


def main() -> None:
    """Print the table."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = HUMAN.read_text(encoding="utf-8").split(">")[1:]
        random.Random(0).shuffle(texts)
        human = {name: folder / f"human_{name}.fasta" for name in ("train", "held_out")}
        for file, part in zip(human.values(), (texts[:800], texts[800:]), strict=True):
            file.write_text("".join(f">{text}" for text in part), encoding="utf-8")
        both = folder / "both.fasta"
        both.write_text(MOUSE.read_text(encoding="utf-8") + human["held_out"].read_text(encoding="utf-8"))
        held_out = (MOUSE, human["held_out"])
        runs = [
            train(folder / "mouse", SHIPPED["train_file"], MOUSE),
            train(folder / "human", human["train"], human["held_out"]),
        ]
        print("| | lost | mouse | human |\n| --- | --- | --- | --- |")
        row("the base", "", runs[0], held_out, use_base=True)
        row("the mouse adapter", "", runs[0], held_out)
        row("the human adapter", "", runs[1], held_out)
        for name, options in WAYS.items():
            combine(name, runs, folder / name.replace("`", ""), held_out, **options)
        combine("the mouse adapter, weight -0.5", runs[:1], folder / "less", held_out, weights=[-0.5])
        search = {"search": True, "flags": flags(both)}
        found = combine("`cat`, weights found on both texts", runs, folder / "found", held_out, **search)
        print_peft_linear(runs, folder / "peft", held_out)
        print(f"\nfound: {found['weights']}, {found['search']['evaluations']} evaluations")


def train(output: Path, text: Path, held_out: Path) -> Path:
    """Train an adapter of rank 8 for 150 steps."""
    words = ["--model_name_or_path", BASE, "--train_file", text, "--validation_file", held_out, "--output_dir", output]
    command = [*map(str, words), "--max_steps", "150", "--eval_steps", "150"]
    peft_mlm.train(config_file("demo.yaml"), flags=command)
    return output


def flags(text: Path) -> list[str]:
    """Say on which text to evaluate."""
    return ["--validation_file", str(text), "--rows", "line", "--per_device_eval_batch_size", "64"]


def row(name: str, lost: str, adapter: Path, held_out: tuple[Path, ...], *, use_base: bool = False) -> None:
    """Measure an adapter on the held-out texts."""
    scores = [
        peft_mlm.evaluate(str(adapter), flags=flags(text), base=str(BASE), use_base=use_base) for text in held_out
    ]
    cells = " | ".join(f"{score['perplexity']:.3f}, {score['accuracy']:.3f}" for score in scores)
    print(f"| {name} | {lost} | {cells} |", flush=True)


def combine(name: str, runs: list[Path], output: Path, held_out: tuple[Path, ...], **options: Any) -> dict[str, Any]:
    """Combine adapters and measure the result."""
    record = peft_mlm.combine([str(run) for run in runs], output, **options)
    row(name, f"{record['relative_error']:.0%}" if record["relative_error"] else "", output, held_out)
    return record


def print_peft_linear(runs: list[Path], output: Path, held_out: tuple[Path, ...]) -> None:
    """Say how far PEFT's `linear` is from the sum of the changes, and what it measures."""
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(BASE), str(runs[0] / "adapter"), "one")
    model.load_adapter(str(runs[1] / "adapter"), "other")
    model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "sum", combination_type="linear")
    off = whole = 0.0
    for module in model.modules():
        if "sum" in getattr(module, "lora_A", {}):
            exact = 0.5 * module.get_delta_weight("one") + 0.5 * module.get_delta_weight("other")
            off += float((module.get_delta_weight("sum") - exact).norm() ** 2)
            whole += float(exact.norm() ** 2)
    model.save_pretrained(str(output), selected_adapters=["sum"])
    row("PEFT's `linear`, weights 0.5, 0.5", f"{(off / whole) ** 0.5:.0%} off", output / "sum", held_out)


if __name__ == "__main__":
    sys.exit(main())
