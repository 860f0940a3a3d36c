"""An adapter that was made from others, or from a model, written like a trained one: with fingerprint, recipe, card.

No local path is in it: adapters are named by the last part of their path, and a base by its name on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.adapter import cast_with_adapter, load_adapter
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import write_base_recipe
from peft_mlm.deltas import Parts, write_parts
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.low_rank import Loss, add_losses
from peft_mlm.merge_proof import largest_number, precise_type, probe_rows
from peft_mlm.run_folder import describe_environment, folder_bytes, write_json, write_text


@dataclass(frozen=True)
class Derived:
    """A new adapter, ready to be written.

    Attributes:
        parts: What it holds.
        base_name: Name of its base as it may be published, or None.
        base_revision: The base's commit on the hub.
        base_arguments: Arguments that shape its base.
        fingerprint: Of its base, or None where it is not known.
        tokenizer: Given where it is not the base's own.
        title: Headline of its card.
        about: Lines of its card: how it was made.
        record: What the file of its record holds.
        record_name: Name of that file.
        plain: Whether plain PEFT loads it right on the base as transformers loads that.
    """

    parts: Parts
    base_name: str | None
    base_revision: str | None
    base_arguments: ModelArguments
    fingerprint: Mapping[str, Any] | None
    tokenizer: PreTrainedTokenizerBase | None
    title: str
    about: Sequence[str]
    record: Mapping[str, Any]
    record_name: str
    plain: bool


def write_derived(derived: Derived, folder: Path) -> int:
    """Write the adapter.

    Args:
        derived: The adapter.
        folder: An existing, empty folder.

    Returns:
        Bytes of its files.
    """
    config = {
        **derived.parts.config,
        "base_model_name_or_path": derived.base_name,
        "revision": derived.base_revision,
    }
    write_parts(Parts(config, derived.parts.changes, derived.parts.whole, derived.parts.rows), folder)
    write_base_recipe(derived.base_arguments, folder)
    if derived.fingerprint is not None:
        write_fingerprint(derived.fingerprint, folder)
    if derived.tokenizer is not None:
        derived.tokenizer.save_pretrained(str(folder))
    write_text(folder / "README.md", _card(derived))
    return write_record(derived, folder)


def write_record(derived: Derived, folder: Path) -> int:
    """Write the file of an adapter's record; in place of the one that is there, where figures have come to it.

    Args:
        derived: The adapter.
        folder: Its folder.

    Returns:
        Bytes of all files in the folder.
    """
    versions = describe_environment("")["versions"]
    write_json(folder / derived.record_name, {**derived.record, "versions": versions})
    return folder_bytes(folder)


def compare_logits(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, expected: torch.Tensor
) -> dict[str, Any]:
    """Load a written adapter on its base and compare it with what it was made from.

    Args:
        folder: The adapter.
        model: The base in float32, grown as far as the adapter needs; it is changed in place.
        tokenizer: Its tokenizer.
        expected: Logits on `merging.probe_rows` of what the adapter was made from, computed in `precise_type`.

    Returns:
        `max_abs_logit_diff` from it, on rows of random tokens; `max_abs_logit_diff_base`, how far the base alone is;
        `max_abs_logit`, to compare them with; `top1_agreement`, share of the `positions` with the same most probable
        token; `compared_in`, the type.
    """
    precise, rows = precise_type(model), probe_rows(model, tokenizer)
    adapted = load_adapter(model, folder).eval()
    cast_with_adapter(adapted, precise)
    given = logits_of(adapted, rows)
    with adapted.disable_adapter():
        alone = logits_of(adapted, rows)
    return {
        "max_abs_logit_diff": largest_number(given - expected),
        "max_abs_logit_diff_base": largest_number(alone - expected),
        "max_abs_logit": largest_number(expected),
        "top1_agreement": float((given.argmax(-1) == expected.argmax(-1)).double().mean()),
        "positions": given[..., 0].numel(),
        "compared_in": str(precise).removeprefix("torch."),
    }


@torch.no_grad()
def logits_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Compute logits, in evaluation mode.

    Args:
        model: A masked LM, with or without an adapter.
        rows: Ids, (B, T), without padding.

    Returns:
        (B, T, V), float64, on the CPU.
    """
    rows = rows.to(model.device)
    model.eval()
    return torch.cat(
        [model(input_ids=r, attention_mask=torch.ones_like(r)).logits.double().cpu() for r in rows.split(4)]
    )


def describe_losses(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """Say what was left out to bring changes of weights to their ranks.

    Args:
        losses: By layer.

    Returns:
        `relative_error`: Frobenius norm of all that was left out, as a share of that of all changes;
        `largest_relative_error` and `matrices`: the same for each matrix alone.
    """
    shares = {name: loss.share for name, loss in losses.items()}
    return {
        "relative_error": add_losses(losses.values()).share,
        "largest_relative_error": max(shares.values(), default=0.0),
        "matrices": shares,
    }


def describe_parts(parts: Parts) -> dict[str, Any]:
    """Count what an adapter holds.

    Args:
        parts: The adapter.

    Returns:
        `layers`, `ranks` (smallest and largest), `parameters` (of the LoRA matrices), `trained_parameters` (names of
        what it puts in place of the base's), `token_rows`.
    """
    ranks = [change.factors.rank for change in parts.changes.values()]
    return {
        "layers": len(parts.changes),
        "ranks": [min(ranks, default=0), max(ranks, default=0)],
        "parameters": sum(c.factors.a.numel() + c.factors.b.numel() for c in parts.changes.values()),
        "trained_parameters": sorted(parts.whole),
        "token_rows": max((len(rows) for rows in parts.rows.values()), default=0),
    }


def _card(derived: Derived) -> str:
    base = derived.base_name
    on_hub = base is not None and "/" in base
    lines = ["---", "library_name: peft", *([f"base_model: {base}"] if on_hub else []), "pipeline_tag: fill-mask"]
    lines += ["tags:", "- masked-lm", "- peft-mlm", "- lora", "---", "", f"# {derived.title}", ""]
    lines += [f"Base model: {base or 'not named by the adapters it was made from'}.", "", *derived.about, ""]
    lines += [f"The figures stand in `{derived.record_name}`.", "", "## Use", "", "```python", "import peft_mlm", ""]
    given = "" if on_hub else f', base="{base or "THE_BASE"}"'
    lines += [f'model = peft_mlm.load("THIS_FOLDER"{given}).model', "```", ""]
    if derived.plain and base is not None:
        pinned = f', revision="{derived.base_revision}"' if derived.base_revision else ""
        lines += [
            "Or with plain PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForMaskedLM",
            "",
            f'base = AutoModelForMaskedLM.from_pretrained("{base}"{pinned})',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()',
            "```",
            "",
        ]
    versions = describe_environment("")["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return "\n".join([*lines, f"Made with {shown}."]) + "\n"
