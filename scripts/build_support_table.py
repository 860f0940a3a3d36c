"""Make docs/support.md: every model type and every PEFT method, run, with the largest differences that were seen.

    .venv/bin/python scripts/build_support_table.py

It takes some minutes. Each figure comes from a tiny model of random weights; the functions that run a type or a method
are those of the tests.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import peft_mlm
from peft_mlm.console import quiet_libraries
from peft_mlm.methods import METHODS, VARIANTS, Base, Method, Variant
from peft_mlm.model_types import MODEL_TYPES
from peft_mlm.run_folder import describe_environment
from tests.matrix_of_methods import BASES, SIZES, run_cell, save_tiny_base
from tests.matrix_of_types import run_type
from tests.tiny import letter_tokenizer, save_base, save_texts

ROOT = Path(__file__).resolve().parent.parent
POSITIONS = {"table": "table", "table after padding": "table less padding", "config": "config", "none": "no limit"}
# Variants that need data or an optimiser of their own, and how to ask for them: run by the command itself.
BY_TRAINING: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "eva": {"init_lora_weights": "eva"},
    "loftq": {"init_lora_weights": "loftq"},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "lorafa": {"use_lorafa": True},
    "asa": {
        "peft_method": "adamss",
        "peft_config": {
            "use_asa": True,
            "r": 8,
            "num_subspaces": 3,
            "subspace_rank": 1,
            "asa_target_subspaces": 3,
            "init_warmup": 1,
            "final_warmup": 6,
            "mask_interval": 2,
        },
        "lora_target_modules": ["query"],
    },
}
BITS: dict[Base, dict[str, Any]] = {
    "float": {},
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
PROBE = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])


@dataclass(frozen=True)
class Seen:
    """What was seen of a method or variant on one kind of base: differences of logits; None where it is not merged."""

    reload: float
    merge: float | None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep bars and tables of the commands away."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def number(value: float) -> str:
    """Write a difference."""
    if math.isnan(value):
        raise SystemExit("a cell was not seen")
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def type_rows(folder: Path) -> list[str]:
    """Run every model type."""
    rows = []
    for name, row in sorted(MODEL_TYPES.items()):
        if row.refusal is not None:
            rows.append(f"| {name} | refused: {row.refusal} | | | | | | | | |")
            continue
        with quietly():
            seen = run_type(name, folder / name)
        tie = "tied" if row.decoder_tied else "own matrix"
        attention = ", ".join(one.replace("_attention_2", "").replace("_attention", "") for one in row.attention)
        rows.append(
            f"| {name} | {number(seen.train)} | {number(seen.gradient)} | {number(seen.reload)} | "
            f"{number(seen.merge)} | "
            f"{', '.join(row.head)}; {tie} | {attention} | {'yes' if row.checkpointing else 'no'} | "
            f"{POSITIONS[row.positions]} | {'no' if row.documents == 'none' else 'yes'} |"
        )
        tell(rows[-1])
    return rows


def method_rows(folder: Path) -> list[str]:
    """Run every method on every kind of base."""
    base = save_tiny_base(folder / "methods")
    rows = []
    for name, row in METHODS.items():
        rows.append(method_row(name, row.title, row, partial(by_cell, base, name, None)))
        tell(rows[-1])
    return rows


def variant_rows(folder: Path) -> list[str]:
    """Run every variant on every kind of base."""
    tiny = save_tiny_base(folder / "variants")
    real = save_base(folder / "with_tokenizer", "bert", **SIZES)
    text = save_texts(folder / "letters.txt", 200)
    rows = []
    for name, row in VARIANTS.items():
        if name in BY_TRAINING:
            run = partial(by_training, real, text, folder, name)
        else:
            run = partial(by_cell, tiny, row.method, name)
        rows.append(method_row(name, f"{row.title} ({row.option})", row, run))
        tell(rows[-1])
    return rows


def method_row(name: str, title: str, row: Method | Variant, run: Callable[[Base], Seen]) -> str:
    """Write the row of a method or variant, running what is not refused."""
    head = f"| [{title}]({row.paper}) | {name} |"
    if row.refused:
        return f"{head} refused: {row.refused} | | | | |"
    cells = []
    for kind in BASES:
        reason = row.bases.get(kind) or (METHODS[row.method].bases.get(kind) if isinstance(row, Variant) else None)
        if reason:
            cells.append(f"refused: {reason}")
            continue
        seen = run(kind)
        merged = "not merged" if seen.merge is None else number(seen.merge)
        cells.append(f"{number(seen.reload)}, {merged}")
    return f"{head} {' | '.join(cells)} | {row.start or 'the base'} |"


def by_cell(folder: Path, method: str, variant: str | None, kind: Base) -> Seen:
    """Run a cell as the tests do."""
    cell = run_cell(folder, method, variant, kind)
    if cell.failed or cell.without_gradient or not cell.finite:
        raise SystemExit(f"{cell}")
    return Seen(cell.reload, cell.merge)


def by_training(base: Path, text: Path, runs: Path, name: str, kind: Base) -> Seen:
    """Train by the command's function, load the run again, and merge it."""
    folder = runs / f"{name}-{kind}"
    values: dict[str, Any] = {
        "model_name_or_path": str(base),
        "train_file": str(text),
        "output_dir": str(folder),
        "rows": "line",
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "use_lora": True,
        **BITS[kind],
        **BY_TRAINING[name],
    }
    if "peft_method" in values:
        del values["use_lora"], values["lora_r"]
    with quietly(), torch.no_grad():
        with torch.enable_grad():
            trained = peft_mlm.train(values).model
        loaded = peft_mlm.load(str(folder)).model
        attention = torch.ones_like(PROBE)
        one, other = (model(input_ids=PROBE, attention_mask=attention).logits for model in (trained, loaded))
        report = peft_mlm.merge(str(folder), folder / "merged")
    return Seen(float((one - other).abs().max()), report["max_abs_logit_diff"])


def tell(row: str) -> None:
    """Show how far it is."""
    print(row, file=sys.stderr, flush=True)


def main() -> None:
    """Run everything and write the page."""
    quiet_libraries()
    assert letter_tokenizer().mask_token_id == 4  # the probe's
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        types, methods, variants = type_rows(folder), method_rows(folder), variant_rows(folder)
    versions = describe_environment("cpu")["versions"]
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    text = f"""# What is supported, and how exactly

Made by `make support`, which runs every row on a tiny model of random weights ({made}; CPU). Figures are the largest
difference that was seen, of any logit unless said otherwise; logits are of the size of 1 to 10.

## Model types

Each type is trained with a LoRA adapter, which is saved, loaded on the untouched base, merged, saved and loaded by
plain transformers. *Training*: the trained weights, against a plain PEFT model in a plain loop. *Gradient*: of our loss
over unequal micro-batches, against the cross-entropy of the whole batch, as a share of the largest gradient. *Reload*
and *merge*: in float32, against the model that was trained. *Packed*: whether texts can stand side by side in a row
(`--rows packed`); UltraBERT and UltraVBERT need flash attention for that where rows are longer than their windows.

| type | training | gradient | reload | merge | head | attention | activation checkpointing | row length | packed |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(types)}

## Methods

`--peft_method NAME`. Each cell: the difference after *reload* on the untouched base (float32), and after the *merge*,
both sides computed in float64, since in float32 the order of sums alone makes up to 1e-5. On a quantised base the merge
is into the dequantised one, with which it is compared; in 8 bits the inputs of layers are rounded too, which a
dequantised layer does not do.

| method | name | float | nf4 | fp4 | int8 | starts as |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(methods)}

## Variants

| variant (option) | name | float | nf4 | fp4 | int8 | starts as |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(variants)}
"""
    (ROOT / "docs" / "support.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
