"""`peft-mlm convert`: an adapter of any method that merges -> plain LoRA; or LoRA -> LoRA of a lower rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.combination_rules import make_recipe
from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import AdapterError, ArgumentsError, MergeError
from peft_mlm.run_folder import check_new_folder, staged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_mlm.adapter_sources import Source
    from peft_mlm.deltas import Parts
    from peft_mlm.derived_adapter import Derived
    from peft_mlm.low_rank import Loss

RECORD = "conversion.json"
# Up to this relative error of the matrices the logits must be those of the original.
EXACT = 1e-6


def convert(
    adapter: str,
    output_dir: str | Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> dict[str, Any]:
    """Make a plain LoRA adapter of an adapter of another method, or lower the rank of a LoRA adapter.

    What another method adds to the weights of the base is taken from its merge, and brought to a rank by singular value
    decomposition; the result is compared with the original by logits. To lower a rank the files alone are read.

    Args:
        adapter: A run folder, or an adapter (a folder or a hub name).
        output_dir: Folder to make; it must not exist, or be empty.
        rank: Rank of each layer; None for the lowest that loses nothing.
        base: Base model, if it is not the recorded one.
        any_base: Convert on a base with other weights than the adapter was trained on.

    Returns:
        `output_dir`, `bytes`, and the record that is written beside the adapter as conversion.json: `adapter`, `rank`,
        `relative_error`, `largest_relative_error`, `matrices`, `layers`, `ranks`, `parameters`, `trained_parameters`,
        `token_rows`, and `logits` (None where the base was not loaded): `max_abs_logit_diff`,
        `max_abs_logit_diff_base`, `max_abs_logit`, `top1_agreement`, `positions`, `compared_in`.

    Raises:
        AdapterError: The adapter cannot be merged, or changes what LoRA cannot; nothing is written then.
        ArgumentsError: The adapter is plain LoRA already, and no rank is given; or the rank is below 1.
        MergeError: The result is not what it was made from.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    output = Path(output_dir).expanduser()
    if rank is not None and rank < 1:
        raise ArgumentsError(f"rank is {rank}: it must be 1 or more.")
    check_new_folder(output)
    from peft_mlm.adapter_sources import open_source
    from peft_mlm.deltas import why_not_plain

    source = open_source(adapter)
    if why_not_plain(source.config):
        return _convert_method(adapter, source, output, rank, base=base, any_base=any_base)
    if rank is None:
        raise ArgumentsError(
            f"{source.name} is plain LoRA already: to lower its rank (it is {source.config.get('r')}) give --rank."
        )
    return _lower_rank(source, output, rank)


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return convert(given.adapter, given.output_dir, rank=given.rank, base=given.base, any_base=given.any_base)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    low, high = record["ranks"]
    rows = [
        ["written to", f"{record['output_dir']} ({bytes_text(record['bytes'])})"],
        ["rank", f"{low}" if low == high else f"{low} to {high}"],
        ["lost by the cut to it", f"{record['relative_error']:.2%} of the change (Frobenius norm)"],
        ["  the worst matrix", f"{record['largest_relative_error']:.2%}"],
        *logit_rows(record["logits"], "the original"),
    ]
    print_table(f"{record['adapter']['name']} ({record['adapter']['method']}) as LoRA", None, rows, stream=sys.stdout)


def logit_rows(logits: dict[str, Any] | None, original: str) -> list[list[Any]]:
    """Give the rows of a table that compare logits.

    Args:
        logits: From `derived_adapter.compare_logits`; None gives no row.
        original: What the adapter was made from, in a few words.

    Returns:
        Names and values.
    """
    if logits is None:
        return []
    return [
        [f"largest difference of a logit from {original}", logits["max_abs_logit_diff"]],
        ["  the base's, without adapter", logits["max_abs_logit_diff_base"]],
        ["same most probable token", f"{logits['top1_agreement']:.2%} of {logits['positions']:,} positions"],
    ]


def help_text() -> str:
    """Give the text of `peft-mlm convert --help`."""
    return _parser().format_help()


def _lower_rank(source: Source, output: Path, rank: int) -> dict[str, Any]:
    """Cut a LoRA adapter to a rank, from its files alone; what else it holds stays as it is."""
    from peft_mlm.adapter_sources import common_tokenizer
    from peft_mlm.combining import combine_parts
    from peft_mlm.deltas import read_parts
    from peft_mlm.derived_adapter import write_derived

    recipe = make_recipe(1, method="svd", rank=rank, trained_modules="first")
    parts = read_parts(source.folder)
    combined = combine_parts([parts], recipe, {})
    record = _record(source, rank, combined.parts, combined.losses)
    derived = _derived(source, combined.parts, common_tokenizer([source]), record)
    with staged(output.resolve()) as folder:
        size = write_derived(derived, folder)
    return {"output_dir": str(output), "bytes": size, **record}


def _convert_method(
    name: str, source: Source, output: Path, rank: int | None, *, base: str | None, any_base: bool
) -> dict[str, Any]:
    """Take what an adapter of any method adds to the weights from its merge."""
    from peft_mlm.derived_adapter import compare_logits, write_derived, write_record

    _check_method(source)
    model, tokenizer, merged, expected = _merge(name, source, base=base, any_base=any_base)
    parts, losses = _as_lora(source, model, merged, rank)
    record = _record(source, rank, parts, losses)
    carried = tokenizer if (source.folder / "tokenizer_config.json").is_file() else None
    derived = _derived(source, parts, carried, record)
    with staged(output.resolve()) as folder:
        write_derived(derived, folder)
        figures = compare_logits(folder, model, tokenizer, expected)
        allowed = 1e-5 * max(1.0, figures["max_abs_logit"])
        if record["relative_error"] <= EXACT and not figures["max_abs_logit_diff"] <= allowed:
            raise MergeError(
                f"The LoRA adapter differs from {source.name} by {figures['max_abs_logit_diff']:.2e} in a logit, "
                f"although its matrices lose nothing (allowed: {allowed:.1e}); nothing was written."
            )
        record["logits"] = figures
        size = write_record(replace(derived, record=record), folder)
    return {"output_dir": str(output), "bytes": size, **record}


def _check_method(source: Source) -> None:
    """Refuse a method that changes no weights, before its base is loaded."""
    from peft_mlm.methods import METHODS

    method = str(source.config["peft_type"]).lower()
    row = METHODS.get(method)
    if row is None:
        raise AdapterError(f"{source.name} is an adapter of {source.config['peft_type']}, which is not known here.")
    if reason := row.refused or row.merge:
        raise AdapterError(f"{source.name} is an adapter of {row.title}, which cannot be made LoRA: {reason}")
    if row.targets in ("norm", "tokens"):
        what = "norms" if row.targets == "norm" else "rows of the embeddings"
        raise AdapterError(
            f"{source.name} is an adapter of {row.title}, which changes {what}; LoRA changes matrices. It can "
            "be merged (peft-mlm merge), or used as it is."
        )


def _merge(
    name: str, source: Source, *, base: str | None, any_base: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, torch.Tensor], torch.Tensor]:
    """Load the base twice: as it is in float32, and with the adapter merged into it; and the logits before that.

    Gives base, tokenizer, merged parameters and logits.
    """
    from peft_mlm.adapter import cast_with_adapter
    from peft_mlm.base_recipe import with_base_recipe
    from peft_mlm.dense_changes import merged_parameters
    from peft_mlm.derived_adapter import logits_of
    from peft_mlm.loading import load_target, prepare_adapter, resolve_target
    from peft_mlm.merge_proof import precise_type, probe_rows
    from peft_mlm.model import load_base, with_tokenizer_of
    from peft_mlm.quantization import dequantise

    target = resolve_target(name, base=base)
    target = replace(target, base=replace(target.base, dtype="float32"))
    quantised = prepare_adapter(target).quantised
    loaded = load_target(target, any_base=any_base, dequantised=quantised)
    adapted: Any = cast_with_adapter(loaded.model, precise_type(loaded.base.model))
    expected = logits_of(adapted, probe_rows(loaded.base.model, loaded.tokenizer))
    merged = merged_parameters(adapted)
    # loaded anew: some methods change the base when they are put on it
    fresh = load_base(with_tokenizer_of(with_base_recipe(target.base, source.folder), source.folder)).model
    return dequantise(fresh).cpu() if quantised else fresh, loaded.tokenizer, merged, expected


def _as_lora(
    source: Source, model: PreTrainedModel, merged: dict[str, torch.Tensor], rank: int | None
) -> tuple[Parts, dict[str, Loss]]:
    """Make LoRA of what a merge has added to the base; trained modules and token rows are taken from the file."""
    from peft_mlm.deltas import Parts, beside_matrices, plain_config
    from peft_mlm.dense_changes import describe_ranks, is_smaller, layer_of, lower_rank, parameter_changes
    from peft_mlm.targets import as_pattern

    every = dict(model.named_parameters(remove_duplicate=False))
    whole, rows = beside_matrices(source.folder, source.config, every)
    taken = {id(every[name]) for name in whole} | {id(every[f"{name}.weight"]) for name in rows}
    changes = {n: c for n, c in parameter_changes(model, merged).items() if id(every[n]) not in taken}
    layers = [name for name, module in model.named_modules() if _is_changed(name, module, changes)]
    can_carry = {f"{n}.{p}" for n in layers for p in ("weight", "bias") if layer_of(model.get_submodule(n)) is not None}
    if other := sorted(changes.keys() - can_carry):
        raise AdapterError(f"{source.name} changes {', '.join(other[:3])}, which is no matrix that LoRA can change.")
    if not layers:
        raise AdapterError(f"{source.name} changes no weight of the base: there is nothing to make LoRA of.")
    lora, losses = lower_rank(changes, model, layers, rank)
    if rank is None and not is_smaller(lora):
        raise AdapterError(
            f"What {source.name} adds to the weights has nearly their full rank: without loss, LoRA would be no "
            f"smaller than they are. Give --rank and take the loss; of these ranks, {describe_ranks(lora)}."
        )
    lora = _with_biases(source, lora, model, changes)
    bias = source.config.get("bias", "none") if whole else "none"
    config = plain_config(
        source.config,
        lora,
        target_modules=as_pattern(model, layers),
        bias=str(bias),
        modules_to_save=source.config.get("modules_to_save") or (),
        rows={name: list(by_id) for name, by_id in rows.items()},
    )
    return Parts(config, lora, whole, rows), losses


def _is_changed(name: str, module: Any, changes: dict[str, Any]) -> bool:
    return any(f"{name}.{parameter}" in changes for parameter, _ in module.named_parameters(recurse=False))


def _with_biases(
    source: Source, lora: dict[str, Any], model: PreTrainedModel, changes: dict[str, Any]
) -> dict[str, Any]:
    """Carry changes of the layers' biases as `lora_bias`, which PEFT has for all layers or for none."""
    import torch

    if not any(f"{name}.bias" in changes for name in lora):
        return lora
    without = [name for name in lora if getattr(model.get_submodule(name), "bias", None) is None]
    if without:
        raise AdapterError(
            f"{source.name} changes biases, which LoRA can carry only where all its layers have one; {without[0]} has "
            "none."
        )
    none = {name: torch.zeros(len(change.factors.b), dtype=torch.float64) for name, change in lora.items()}
    return {name: replace(c, bias=changes.get(f"{name}.bias", none[name])) for name, c in lora.items()}


def _record(source: Source, rank: int | None, parts: Parts, losses: dict[str, Loss] | Any) -> dict[str, Any]:
    from peft_mlm.derived_adapter import describe_losses, describe_parts

    return {
        "adapter": source.describe(),
        "rank": rank,
        **describe_losses(losses),
        **describe_parts(parts),
        "logits": None,
    }


def _derived(source: Source, parts: Parts, tokenizer: Any, record: dict[str, Any]) -> Derived:
    from peft_mlm.adapter_sources import base_name, loads_plainly
    from peft_mlm.arguments import ModelArguments
    from peft_mlm.base_recipe import with_base_recipe
    from peft_mlm.derived_adapter import Derived
    from peft_mlm.methods import METHODS

    shown, revision = base_name([source])
    title = METHODS[record["adapter"]["method"]].title
    lost = f"{record['relative_error']:.2%}" if record["relative_error"] > EXACT else "nothing"
    return Derived(
        parts=parts,
        base_name=shown,
        base_revision=revision,
        base_arguments=with_base_recipe(ModelArguments(), source.folder),
        fingerprint=source.fingerprint,
        tokenizer=tokenizer,
        title="Converted adapter for masked language modelling",
        about=[f"Plain LoRA made of {source.name}, an adapter of {title}. The cut to its rank has lost {lost}."],
        record=record,
        record_name=RECORD,
        plain=loads_plainly([source]),
    )


def _parser() -> CommandParser:
    parser = CommandParser("convert", __doc__)
    parser.add_argument("adapter", help="run folder, or an adapter's folder or hub name")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--rank", type=int, help="rank of each layer (default: the lowest that loses nothing)")
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
