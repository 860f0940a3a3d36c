"""The card and the checksums of a merged model, from what lies beside its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mlm.card import render_card
from peft_mlm.checksums import write_checksums
from peft_mlm.inspection import inspect_shipped
from peft_mlm.run_folder import describe_environment, write_text
from peft_mlm.safetensors_header import read_header, weight_files
from peft_mlm.shipped import find_shipped

SHOWN_VERSIONS = ("peft-mlm", "torch", "transformers", "peft")


def finish_merged(folder: Path, adapter: Path, report: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Write the model card and the checksums of a merged model; nothing is written into its folder afterwards.

    Args:
        folder: The merged model, complete but for these two files.
        adapter: The adapter that was merged.
        report: What the comparison gave, as in `merge_report.json`.
        sums: SHA-256 of the files that were hashed while they were written.
    """
    write_text(folder / "README.md", render_card(_facts(folder, adapter, report)))
    write_checksums(folder, sums)


def _facts(folder: Path, adapter: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    record = inspect_shipped(find_shipped(adapter))
    base, training = record["base"], record["training"] or {}
    data, masking = base["data"] or {}, base["masking"] or {}
    train = data.get("train") or {}
    rank, versions = record["rank"], describe_environment("")["versions"]
    sizes = (
        f", rank {rank}" + (f", alpha {record['alpha']:g}" if record["alpha"] else "") if isinstance(rank, int) else ""
    )
    return {
        "kind": "model",
        "base_model": base["name"],
        "base_revision": base["revision"],
        # only a name that was looked up on the hub comes with a commit
        "base_on_hub": bool(base["name"] and base["revision"]),
        "method": f"{record['title']}{sizes}, merged into the base",
        "peft_type": record["method"],
        "trained_modules": record["trained_modules"],
        "trainable_parameters": record["parameters"],
        "total_parameters": sum(read_header(file).count for file in weight_files(folder)),
        "data": data.get("name"),
        "dataset": None,
        "rows": train.get("rows_used"),
        "max_seq_length": train.get("max_seq_length"),
        "mlm_probability": masking.get("mlm_probability"),
        "steps": training.get("steps"),
        "base": training.get("base"),
        "adapted": training.get("adapted"),
        "max_abs_logit_diff": report.get("max_abs_logit_diff"),
        "renamed": False,
        "new_tokens": record["new_tokens"],
        "growth_code": (),
        "untied": False,
        "quantisation": None,
        "base_recipe": {},
        "versions": {name: versions[name] for name in SHOWN_VERSIONS},
    }
