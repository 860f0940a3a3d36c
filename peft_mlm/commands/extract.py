"""`peft-mlm extract`: a fully trained model less its base -> a LoRA adapter, with what it leaves out told."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.commands.convert import logit_rows
from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import AdapterError, ArgumentsError, ModelError
from peft_mlm.run_folder import check_new_folder, staged

if TYPE_CHECKING:
    import torch

    from peft_mlm.derived_adapter import Derived
    from peft_mlm.loading import Loaded
    from peft_mlm.model import Base

RECORD = "extraction.json"
CARRIED = {
    "biases": "of the layers that LoRA is added to",
    "norms": "of the encoder",
    "embeddings": "rows of tokens that differ, and position embeddings",
    "head": "its parts that are not tied to the embeddings",
    "other": "all other layers that differ",
}


@dataclass
class Rest:
    """What differs between two models beside the matrices that LoRA is made of.

    Attributes:
        whole: Parameters to be put in place of the base's.
        modules: Their modules.
        rows: Rows to be put in place of the base's, by matrix and token id.
        biases: Changes of biases, by layer.
        left: Names of parameters that are not carried.
    """

    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    rows: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def extract(
    model: str,
    output_dir: str | Path,
    *,
    rank: int,
    base: str | None = None,
    carry: str | Sequence[str] = (),
    lora_target_modules: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Make a LoRA adapter of a fully trained model and its base.

    Of each linear layer of the encoder the difference of the weights is brought to a rank by singular value
    decomposition. What else differs is left out, and told, unless `carry` names it. The head is always carried where
    the base has none; so are the rows of tokens that the base does not have.

    Args:
        model: A trained model: a folder, a hub name, or a run folder that trained the whole model.
        output_dir: Folder to make; it must not exist, or be empty.
        rank: Rank of each layer.
        base: The model that training began with; a run knows it.
        carry: Names of `CARRIED`, or "all".
        lora_target_modules: Names of layers, as in training; all linear layers of the encoder by default.

    Returns:
        `output_dir`, `bytes`, and the record that is written beside the adapter as extraction.json: `model`, `rank`,
        `carry`, `relative_error`, `largest_relative_error`, `matrices`, `layers`, `ranks`, `parameters`,
        `trained_parameters`, `token_rows`, `left_out` (parameters that differ and are not carried),
        `left_out_share` (Frobenius norm of their change, as a share of that of all changes), and `logits` as in
        `convert`.

    Raises:
        AdapterError: The two are of different makes, or do not differ; nothing is written then.
        ArgumentsError: `carry` names nothing that is known; or the rank is below 1.
        ModelError: A model cannot be loaded, or the base is not known.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    output = Path(output_dir).expanduser()
    groups = _groups(carry)
    if rank < 1:
        raise ArgumentsError(f"rank is {rank}: it must be 1 or more.")
    check_new_folder(output)
    from peft_mlm.adapter import cast_with_adapter
    from peft_mlm.derived_adapter import compare_logits, logits_of, write_derived, write_record
    from peft_mlm.merge_proof import precise_type, probe_rows

    tuned, start = _load_both(model, base)
    shown = _shown_name(model)
    record, derived = _extract(shown, tuned, start, rank, groups, lora_target_modules)
    precise = precise_type(start.model)
    expected = logits_of(cast_with_adapter(tuned.model, precise), probe_rows(tuned.base.model, tuned.tokenizer))
    with staged(output.resolve()) as folder:
        write_derived(derived, folder)
        record["logits"] = compare_logits(folder, start.model, start.tokenizer, expected)
        size = write_record(replace(derived, record=record), folder)
    return {"output_dir": str(output), "bytes": size, **record}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    targets = None if given.lora_target_modules is None else given.lora_target_modules.split(",")
    return extract(
        given.model, given.output_dir, rank=given.rank, base=given.base, carry=given.carry, lora_target_modules=targets
    )


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    left = record["left_out"]
    rows = [
        ["written to", f"{record['output_dir']} ({bytes_text(record['bytes'])})"],
        ["rank", f"{record['rank']}, {record['layers']} layers"],
        ["lost by the cut to it", f"{record['relative_error']:.2%} of the layers' change (Frobenius norm)"],
        ["  the worst matrix", f"{record['largest_relative_error']:.2%}"],
        ["not carried", f"{len(left)} parameters, {record['left_out_share']:.2%} of all change"],
        *([["  such as", ", ".join(left[:3])]] if left else []),
        *logit_rows(record["logits"], "the model"),
    ]
    print_table(f"{record['model']} as LoRA", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm extract --help`."""
    names = "\n".join(f"  {name:<12} {about}" for name, about in CARRIED.items())
    return f"{_parser().format_help()}\n--carry takes names separated by commas, or all:\n{names}\n"


def _groups(carry: str | Sequence[str]) -> set[str]:
    names = [name for name in carry.split(",") if name] if isinstance(carry, str) else list(carry)
    if unknown := [name for name in names if name not in (*CARRIED, "all")]:
        raise ArgumentsError(f"carry: {', '.join(unknown)} is not known. Choose among {', '.join(CARRIED)}, or all.")
    return set(CARRIED) if "all" in names else set(names)


def _shown_name(name_or_path: str) -> str:
    path = Path(name_or_path).expanduser()
    return path.resolve().name if path.exists() else name_or_path


def _load_both(name: str, base: str | None) -> tuple[Loaded, Base]:
    """Load the trained model, and the model it began with, with as long a vocabulary."""
    from peft_mlm.arguments import ModelArguments
    from peft_mlm.loading import load_target, resolve_target
    from peft_mlm.model import load_base
    from peft_mlm.quantization import is_quantised

    target = resolve_target(name)
    if target.adapter is not None:
        raise AdapterError(f"{name} is an adapter. To make LoRA of it, or to lower its rank: peft-mlm convert.")
    if base is None and target.arguments is None:
        raise ModelError(f"Which model did {name} begin with? Give it with --base.")
    of_base = ModelArguments(model_name_or_path=base)
    if base is None:
        of_base = replace(resolve_target(name, part="base").base, dtype="float32")
    tuned = load_target(replace(target, base=replace(target.base, dtype="float32")))
    mine = tuned.base.name_or_path
    start = load_base(of_base if of_base.tokenizer_name else replace(of_base, tokenizer_name=mine))
    if is_quantised(tuned.model) or is_quantised(start.model):
        raise AdapterError("One of the two models is quantised: a difference of weights needs both in float.")
    if type(tuned.base.model) is not type(start.model):
        kinds = f"{type(tuned.base.model).__name__} and {type(start.model).__name__}"
        raise AdapterError(f"The two models are of different types ({kinds}): there is no difference of their weights.")
    return tuned, start


def _extract(
    shown: str, tuned: Loaded, start: Base, rank: int, groups: set[str], targets: Sequence[str] | None
) -> tuple[dict[str, Any], Derived]:
    from peft_mlm.adapter_config import find_targets
    from peft_mlm.arguments import ModelArguments, PEFTArguments
    from peft_mlm.deltas import Parts, plain_config
    from peft_mlm.dense_changes import check_same_make, lower_rank, parameter_changes
    from peft_mlm.derived_adapter import Derived, describe_losses, describe_parts
    from peft_mlm.low_rank import Loss, add_losses
    from peft_mlm.model import published_name
    from peft_mlm.targets import as_pattern

    check_same_make(start.model, tuned.base.model)
    changes = parameter_changes(start.model, dict(tuned.base.model.named_parameters()))
    if not changes:
        raise AdapterError(f"{shown} and its base have the same weights: there is nothing to extract.")
    asked = PEFTArguments(use_lora=True, lora_target_modules=None if targets is None else list(targets))
    rest = Rest()
    layers = find_targets(start.model, asked, without=())
    _sort_rest(rest, start, tuned, changes, layers, groups)
    layers = [name for name in layers if name not in rest.modules]
    lora, losses = lower_rank(changes, start.model, layers, rank)
    lora = {name: replace(change, bias=rest.biases.get(name)) for name, change in lora.items()}
    config = plain_config(
        _mapping_of(start.model),
        lora,
        target_modules=as_pattern(start.model, layers),
        modules_to_save=rest.modules,
        rows={name: list(by_id) for name, by_id in rest.rows.items()},
    )
    parts = Parts(config, lora, rest.whole, rest.rows)
    everything = add_losses(Loss(0.0, float(change.norm())) for change in changes.values())
    left = add_losses(Loss(float(changes[name].norm()), 0.0) for name in rest.left)
    record = {
        "model": shown,
        "rank": rank,
        "carry": sorted(groups),
        **describe_losses(losses),
        **describe_parts(parts),
        "left_out": rest.left,
        "left_out_share": left.lost / everything.whole,
        "logits": None,
    }
    lost = f"The cut to rank {rank} has lost {record['relative_error']:.2%} of the change of these layers' weights."
    about = [f"LoRA made of the difference between {shown} and its base. {lost}"]
    if rest.left:
        about += ["", f"Not carried: {', '.join(rest.left)} ({record['left_out_share']:.2%} of all change)."]
    grown = bool(start.new_token_ids) or start.renamed_weights or bool(rest.rows)
    return record, Derived(
        parts=parts,
        base_name=published_name(start.name_or_path),
        base_revision=start.revision,
        base_arguments=ModelArguments(),
        fingerprint=start.fingerprint,
        tokenizer=start.tokenizer if start.tokenizer_changed or start.new_token_ids else None,
        title="Adapter extracted from a trained model",
        about=about,
        record=record,
        record_name=RECORD,
        plain=not grown,
    )


def _sort_rest(
    rest: Rest, start: Base, tuned: Loaded, changes: Mapping[str, Any], layers: Sequence[str], groups: set[str]
) -> None:
    """Decide of each parameter that differs, and that LoRA does not reach, whether and how it is carried."""
    from peft_mlm.heads import encoder_parameters, tied_parameters
    from peft_mlm.vocabulary import row_tables

    model = start.model
    parameters, of_encoder = dict(model.named_parameters()), encoder_parameters(model)
    theirs, tied = dict(tuned.base.model.named_parameters()), tied_parameters(model)
    tables = {f"{name}.weight": name for name in row_tables(model)}
    fresh = {id(model.get_parameter(name)) for name in start.fresh_parameters}
    # PEFT brings rows to the other end of a tie only where the config as written says so; nomic_bert's does not.
    tied_rows = id(model.get_input_embeddings().weight) in tied
    rows_reach_decoder = not tied_rows or bool(model.config.to_dict().get("tie_word_embeddings"))
    all_have_bias = all(getattr(model.get_submodule(name), "bias", None) is not None for name in layers)
    for name in changes:
        owner, _, kind = name.rpartition(".")
        group = _group_of(name, model.get_submodule(owner), of_encoder, parameters[name])
        is_fresh = id(parameters[name]) in fresh
        if name in tables and not (group == "head" and "head" in groups):
            differ = changes[name].any(dim=1).nonzero().flatten().tolist()
            kept = set(differ if "embeddings" in groups and group != "head" and rows_reach_decoder else ())
            kept |= set(start.new_token_ids)
            rest.rows |= {tables[name]: {i: theirs[name][i].detach().double() for i in sorted(kept)}} if kept else {}
            rest.left += [name] if set(differ) - kept else []
        elif owner in layers and kind == "weight":
            continue
        elif owner in layers and kind == "bias" and all_have_bias:
            if "biases" in groups:
                rest.biases |= {layer: changes.get(f"{layer}.bias", _zeros(model, layer)) for layer in layers}
            else:
                rest.left.append(name)
        elif (group in groups or is_fresh) and not _has_tied(model.get_submodule(owner), tied) and owner not in layers:
            rest.modules += [owner] if owner not in rest.modules else []
        else:
            rest.left.append(name)
    for owner in rest.modules:
        of_module = [f"{owner}.{kind}" for kind, _ in model.get_submodule(owner).named_parameters()]
        rest.whole |= {name: theirs[name].detach() for name in of_module}
    rest.left = [name for name in rest.left if name not in rest.whole]


def _group_of(name: str, module: Any, of_encoder: set[int], parameter: Any) -> str:
    from torch import nn

    if of_encoder and id(parameter) not in of_encoder:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norms" if "norm" in type(module).__name__.lower() else "other"


def _zeros(model: Any, layer: str) -> torch.Tensor:
    return model.get_parameter(f"{layer}.bias").detach().double() * 0


def _has_tied(module: Any, tied: set[int]) -> bool:
    # a copy of such a module would cut the tie
    return any(id(parameter) in tied for parameter in module.parameters()) or any(module.children())


def _mapping_of(model: Any) -> dict[str, Any]:
    """Name the code of the base as PEFT does where there is no task type."""
    return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}}


def _parser() -> CommandParser:
    parser = CommandParser("extract", __doc__)
    parser.add_argument("model", help="trained model: a folder, a hub name, or the run that trained all of it")
    parser.add_argument("--base", help="the model that training began with; a run knows it")
    parser.add_argument("--rank", type=int, required=True, help="rank of each layer")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--carry", default="", help="what else to ship, in full (below); nothing by default")
    parser.add_argument("--lora_target_modules", help="names of layers, separated by commas (default: the encoder's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
