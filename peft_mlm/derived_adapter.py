"""An adapter that was made from others, or from a model, written like a trained one: with fingerprint, recipe, card.

No local path is in it: adapters are named by the last part of their path, and a base by its name on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import write_base_recipe
from peft_mlm.deltas import Parts, write_parts
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.low_rank import Loss, add_losses
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
    versions = describe_environment("")["versions"]
    write_json(folder / derived.record_name, {**derived.record, "versions": versions})
    write_text(folder / "README.md", _card(derived, versions))
    return folder_bytes(folder)


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


def _card(derived: Derived, versions: Mapping[str, str | None]) -> str:
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
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return "\n".join([*lines, f"Made with {shown}."]) + "\n"
