"""A checkpoint whose masked LM head, or all of it, stands under other names: found by role and shape, and renamed.

A head here is: a dense layer, an activation, a norm, and a decoder (a matrix, mostly the embeddings', and a bias).
Libraries name these parts differently. Only names of masked LM heads are in the table below; a discriminator's head, a
classifier's, a pooler or a next-sentence head is never taken for one, however alike its shapes are. What cannot be told
for sure is left alone and said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from peft_mlm.heads import encoder_parameters

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Part of a head -> its module's name, one row per family of names; where they are from.
HEADS: dict[str, dict[str, str]] = {
    # BERT, DeBERTa, RoFormer, ... (transformers; google-research/bert)
    "cls.predictions": {
        "dense": r"cls\.predictions\.(?:transform\.)?dense",
        "norm": r"cls\.predictions\.(?:transform\.)?(?:LayerNorm|layer_norm|norm)",
        "decoder": r"cls\.predictions(?:\.decoder)?",
    },
    # RoBERTa, ESM, MPNet, ... (transformers; fairseq)
    "lm_head": {
        "dense": r"lm_head\.dense",
        "norm": r"lm_head\.(?:LayerNorm|layer_norm|norm)",
        "decoder": r"lm_head(?:\.decoder)?",
    },
    # ALBERT (transformers)
    "predictions": {
        "dense": r"predictions\.dense",
        "norm": r"predictions\.LayerNorm",
        "decoder": r"predictions(?:\.decoder)?",
    },
    # ELECTRA's generator, ConvBERT (transformers)
    "generator_predictions": {
        "dense": r"generator_predictions\.dense",
        "norm": r"generator_predictions\.LayerNorm",
        "decoder": r"generator_lm_head",
    },
    # DistilBERT (transformers)
    "vocab_projector": {"dense": r"vocab_transform", "norm": r"vocab_layer_norm", "decoder": r"vocab_projector"},
    # ModernBERT (transformers; AnswerDotAI)
    "head": {"dense": r"head\.dense", "norm": r"head\.norm", "decoder": r"decoder"},
    # DeBERTa (microsoft/DeBERTa; transformers with legacy=False)
    "lm_predictions": {
        "dense": r"lm_predictions\.lm_head\.dense",
        "norm": r"lm_predictions\.lm_head\.LayerNorm",
        "decoder": r"lm_predictions\.lm_head",
    },
}
# Names that libraries put before a whole model, or before a head, without changing it.
WRAPPERS = (
    "module",
    "model",
    "_orig_mod",
    "base_model",
    "auto_model",
    "transformer",
    "backbone",
    "net",
    "encoder",
    "0",
)
KINDS = {"weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
# Tensors that a masked LM has no use for, found in many good checkpoints.
NOT_OF_A_MASKED_LM = re.compile(
    r"(^|\.)(pooler|seq_relationship|classifier|score|qa_outputs|position_ids|token_type_ids|contact_head|"
    r"discriminator_predictions|mask_predictions|dense_prediction|sop_classifier)(\.|$)"
)

Role = tuple[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, without their values.

    Attributes:
        shapes: Shape by name.
        read: Gives the values of one of them.
        files: Where they lie.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Renaming:
    """What to load under another name.

    Attributes:
        names: The model's name by the checkpoint's.
        notice: A sentence that says what was renamed, or why a head of the checkpoint was not used; "" for neither.
    """

    names: dict[str, str]
    notice: str = ""

    def patterns(self) -> dict[str, str]:
        """Give the names as transformers takes them: a regular expression, and what to put in its place."""
        return {f"^{re.escape(theirs)}$": ours for theirs, ours in self.names.items()}


def open_checkpoint(name_or_path: str, **options: Any) -> Checkpoint:
    """Look at the names and shapes of a checkpoint in safetensors, one file or several with an index.

    Args:
        name_or_path: A folder, or a hub name whose files are in the cache.
        **options: `cache_dir`, `revision`, `token`, as transformers takes them.

    Returns:
        Its tensors; none where there are no such files.
    """

    def find(file: str) -> str | None:
        folder = Path(name_or_path).expanduser()
        if folder.is_dir():
            return str(folder / file) if (folder / file).is_file() else None
        found: str | None = cached_file(
            name_or_path, file, _raise_exceptions_for_missing_entries=False, local_files_only=True, **options
        )
        return found

    index = find(WEIGHTS_INDEX)
    parts = [WEIGHTS]
    if find(WEIGHTS) is None and index is not None:
        parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, str] = {}
    for file in filter(None, map(find, parts)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
                files[name] = file

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return Checkpoint(shapes, read, tuple(Path(file) for file in dict.fromkeys(files.values())))


def rename_checkpoint(model: PreTrainedModel, missing: Iterable[str], checkpoint: Checkpoint) -> Renaming:
    """Find what the model lacks under other names of the checkpoint.

    Args:
        model: The masked LM, as built.
        missing: Names of its parameters that loading did not find.
        checkpoint: What lies in the files.

    Returns:
        Names to load from: the whole model's where they differ by a prefix alone, and the head's where exactly one
        complete masked LM head fits by role and shape.
    """
    lacking = set(missing)
    wrapped = _unwrapped(model, lacking, checkpoint)
    known = {wrapped.get(name, name): name for name in checkpoint.shapes}
    head = _rename_head(model, {name for name in lacking if name not in known}, known, checkpoint)
    names = {theirs: ours for theirs, ours in wrapped.items() if theirs not in head.names} | head.names
    notices = [head.notice] if head.notice else []
    if wrapped:
        theirs, ours = next(iter(wrapped.items()))
        notices.insert(0, f"The checkpoint's names differ by a prefix: {len(wrapped)} were mapped, {theirs} to {ours}.")
    return Renaming(names, " ".join(notices))


def describe_unused(unexpected: Iterable[str], *, all_of_them: bool, limit: int = 8) -> str:
    """Name what a checkpoint holds beyond the model.

    Args:
        unexpected: Names that loading had no place for.
        all_of_them: Whether to name poolers, classifiers and the like too.
        limit: How many to name.

    Returns:
        The names; "" where there are none.
    """
    left = sorted(name for name in unexpected if all_of_them or not NOT_OF_A_MASKED_LM.search(name))
    shown = ", ".join(left[:limit])
    return shown if len(left) <= limit else f"{shown}, and {len(left) - limit} more"


def _unwrapped(model: PreTrainedModel, lacking: set[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Find the prefix without which the checkpoint holds the model's encoder; else nothing is renamed."""
    places = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(places[name]) for name in lacking if name in places} & encoder_parameters(model)
    if not wanted:
        return {}
    chain = re.compile(rf"((?:{'|'.join(WRAPPERS)})\.)+")
    prefixes = set()
    for name in checkpoint.shapes:
        match = chain.match(name)
        parts = match.group().split(".")[:-1] if match else []
        prefixes |= {".".join(parts[: i + 1]) + "." for i in range(len(parts))}
    found = []
    for prefix in prefixes:
        names = _without_prefix(prefix, model.base_model_prefix, places, checkpoint.shapes)
        filled = {id(places[name]) for name in names.values()}
        if filled >= wanted and len(set(names.values())) == len(names):
            found.append(names)
    found.sort(key=len, reverse=True)
    return found[0] if len(found) == 1 or (found and len(found[0]) > len(found[1])) else {}


def _without_prefix(
    prefix: str, base_prefix: str, places: Mapping[str, torch.nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Give the names that are the model's own, with the right shape, once a prefix is taken off."""
    names = {}
    for theirs, shape in shapes.items():
        owner, _, last = theirs.removeprefix(prefix).rpartition(".")
        inner = f"{owner}.{KINDS.get(last, last)}"
        for ours in (inner, f"{base_prefix}.{inner}"):
            if theirs.startswith(prefix) and ours in places and tuple(places[ours].shape) == shape:
                names[theirs] = ours
                break
    return names


def _rename_head(
    model: PreTrainedModel, lacking: set[str], known: Mapping[str, str], checkpoint: Checkpoint
) -> Renaming:
    """Find the one complete head of the checkpoint that fills what the model's head lacks.

    `known` gives the checkpoint's names by what they are once a prefix is taken off.
    """
    places = dict(model.named_parameters(remove_duplicate=False))
    fresh = {id(places[name]) for name in lacking if name in places} - encoder_parameters(model)
    if not fresh or len(_heads(places)) != 1:
        return Renaming({})
    (own,) = _heads(places).values()
    foreign = {
        family: head
        for family, head in _heads(known).items()
        if _is_complete(head) and any(name not in places for names in head.values() for name in names)
    }
    if not foreign:
        return Renaming({})
    if len(foreign) > 1:
        said = ", ".join(sorted(names[0] for head in foreign.values() for names in head.values())[:6])
        return Renaming({}, f"The checkpoint holds more than one masked LM head ({said}, ...): none is used.")
    (head,) = foreign.values()
    reason = _misfit(own, head, fresh, places, known, checkpoint)
    if reason:
        held = ", ".join(name for names in head.values() for name in names)
        return Renaming({}, f"The checkpoint holds another masked LM head ({held}), which is not used: {reason}.")
    names = {known[theirs[0]]: own[role][0] for role, theirs in head.items() if theirs[0] not in places}
    mapped = ", ".join(f"{theirs} to {ours}" for theirs, ours in names.items())
    return Renaming(names, f"The checkpoint's masked LM head has other names; loaded: {mapped}.")


def _misfit(
    own: Mapping[Role, list[str]],
    head: Mapping[Role, list[str]],
    fresh: set[int],
    places: Mapping[str, torch.nn.Parameter],
    known: Mapping[str, str],
    checkpoint: Checkpoint,
) -> str:
    """Say why a head of the checkpoint cannot be the model's; "" if it can."""
    named = {name for names in own.values() for name in names}
    unnamed = [name for name, parameter in places.items() if id(parameter) in fresh and name not in named]
    if unnamed:
        return f"{', '.join(unnamed)} has no part there"
    for role, ours in own.items():
        parameters = {id(places[name]) for name in ours}
        if len(parameters) > 1:
            return f"{', '.join(ours)} play the same part in this model"
        if parameters & fresh and role not in head:
            return f"it has no {'.'.join(role)}"
        elsewhere = any(name not in places for name in head.get(role, ()))
        if elsewhere and not parameters & fresh and role != ("decoder", "weight"):
            return f"the checkpoint holds {ours[0]} under the model's own name too"
    for role, theirs in head.items():
        if role not in own:
            return f"this model has no place for {theirs[0]}"
        if any(checkpoint.shapes[known[name]] != tuple(places[own[role][0]].shape) for name in theirs):
            return f"the shape of {theirs[0]} is not {tuple(places[own[role][0]].shape)}"
        values = [checkpoint.read(known[name]) for name in theirs]
        if any(not torch.equal(value, values[0]) for value in values[1:]):
            return f"{' and '.join(theirs)} differ"
    return ""


def _heads(names: Iterable[str]) -> dict[tuple[str, str], dict[Role, list[str]]]:
    """Sort names into heads: by family and what stands before, then by role."""
    before = rf"(?P<before>(?:(?:{'|'.join(WRAPPERS)})\.)*)"
    heads: dict[tuple[str, str], dict[Role, list[str]]] = {}
    for name in sorted(names):
        module, _, last = name.rpartition(".")
        if last not in KINDS:
            continue
        for family, parts in HEADS.items():
            for part, pattern in parts.items():
                match = re.fullmatch(before + pattern, module)
                if match:
                    head = heads.setdefault((family, match["before"]), {})
                    head.setdefault((part, KINDS[last]), []).append(name)
    return heads


def _is_complete(head: Mapping[Role, list[str]]) -> bool:
    """Tell whether a head has a dense layer, a norm, and something of a decoder: else it may be any other head."""
    has_decoder = ("decoder", "bias") in head or ("decoder", "weight") in head
    return {("dense", "weight"), ("norm", "weight")} <= set(head) and has_decoder
