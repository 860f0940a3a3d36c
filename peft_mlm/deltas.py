"""An adapter's files <-> what it adds to each weight of the base, scaling included.

Read are LoRA adapters whose change of a weight W is s B A (rsLoRA, ranks and alphas by layer, `lora_bias`, trained
biases, modules and token rows beside it). What depends on W itself (DoRA), or on a base that was changed before
training (PiSSA as plain PEFT saves it), is no such sum. Written is plain LoRA of scaling 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_mlm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder
from peft_mlm.errors import AdapterError
from peft_mlm.low_rank import Factors
from peft_mlm.methods import METHODS, VARIANTS
from peft_mlm.peft_rules import active_variants

PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|token_adapter\.trainable_tokens_delta)"
)
# Variants of LoRA whose change of a weight is s B A all the same.
PLAIN_VARIANTS = (
    "rslora", "lora_bias", "bias", "gaussian", "orthogonal", "random", "eva", "loftq", "mica", "velora", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one weight.

    Attributes:
        factors: The change is b @ a, in the order (out, in); of an embedding (size, tokens); of a convolution the
            inputs and the places of its kernel make one dimension.
        kind: "linear" (a convolution too) or "embedding".
        inputs: Shape of the matrix A in the file, without its rank.
        tail: Shape of the matrix B in the file, after its rank: (1,) for a convolution.
        bias: (out,), float64, what is added to the layer's bias (`lora_bias`); None for nothing.
    """

    factors: Factors
    kind: Literal["linear", "embedding"] = "linear"
    inputs: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """All that a LoRA adapter holds.

    Attributes:
        config: Its `adapter_config.json`.
        changes: What it adds to weights, by the full name of the layer.
        whole: Parameters that it puts in place of the base's, by their full names in the base (trained modules and
            biases), as they are in the file.
        rows: Rows that it puts in place of the base's: by the full name of the matrix, values by token id.
    """

    config: Mapping[str, Any]
    changes: Mapping[str, Change] = field(default_factory=dict)
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, Mapping[int, torch.Tensor]] = field(default_factory=dict)


def read_parts(folder: Path) -> Parts:
    """Read a LoRA adapter.

    Args:
        folder: Its folder.

    Returns:
        Its changes, in float64.

    Raises:
        AdapterError: It is damaged, of another method, or its change of a weight is not s B A.
    """
    config = check_adapter_folder(folder)
    if reason := why_not_plain(config):
        raise AdapterError(f"{folder} {reason}")
    tensors = read_tensors(folder)
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    whole, rows = {}, dict[str, dict[int, torch.Tensor]]()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = PARTS.fullmatch(name)
        if match is None:
            if "lora_" in name or not key.startswith(PREFIX):
                raise AdapterError(f"{folder} holds {key}, which is no part of plain LoRA that this version knows.")
            whole[name.replace(".base_layer.", ".")] = tensor
        elif match["part"].startswith("token_adapter"):
            ids = _ids_of_rows(config, match["module"])
            if len(ids) != len(tensor):
                raise AdapterError(
                    f"{folder} names {len(ids)} trained rows of {match['module']}, and holds {len(tensor)}."
                )
            rows[match["module"]] = dict(zip(ids, tensor.double(), strict=True))
        else:
            matrices.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
    changes = {name: _change(folder, name, of_layer, config) for name, of_layer in matrices.items()}
    return Parts(config, changes, whole, rows)


def beside_matrices(
    folder: Path, config: Mapping[str, Any], parameters: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, torch.Tensor]]]:
    """Read what an adapter of any method puts in place of the base's parameters.

    Args:
        folder: Its folder.
        config: Its `adapter_config.json`.
        parameters: Names of all parameters of the base, tied ones under each of their names.

    Returns:
        Parameters of trained modules and biases, and trained token rows, as in `Parts`.
    """
    whole, rows = {}, {}
    for key, tensor in read_tensors(folder).items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        module, _, rest = name.partition(".token_adapter.")
        if rest:
            rows[module] = dict(zip(_ids_of_rows(config, module), tensor.double(), strict=True))
        elif name in parameters:
            whole[name] = tensor
    return whole, rows


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter.

    Args:
        folder: Its folder.

    Returns:
        Tensors by key, in the types of the file.

    Raises:
        AdapterError: The file is damaged, or a value is not finite.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}.") from error
    wrong = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS} holds values that are not finite, in {wrong[0]}.")
    return tensors


def why_not_plain(config: Mapping[str, Any]) -> str:
    """Say why an adapter's change of a weight is not s B A.

    Args:
        config: Its `adapter_config.json`.

    Returns:
        The rest of a sentence that begins with the adapter's name; empty for plain LoRA.
    """
    method = str(config["peft_type"]).lower()
    if method != "lora":
        title = METHODS[method].title if method in METHODS else config["peft_type"]
        return f"is an adapter of {title}, not LoRA: make LoRA of it first, by peft-mlm convert."
    # options that PEFT writes although they ask for nothing: {}
    options = {name: value for name, value in config.items() if value not in ({}, [])}
    other = [name for name in active_variants("lora", options) if name not in PLAIN_VARIANTS]
    if other == ["dora"]:
        return (
            "was trained with DoRA, which scales the base's own weights: such a change is no product of two thin "
            "matrices, and two of them cannot be added. Make its nearest LoRA first, by peft-mlm convert --rank."
        )
    if other:
        title = VARIANTS[other[0]].title
        return (
            f"is {title} as PEFT saves it, whose change of a weight depends on the base's weights: make plain LoRA of "
            "it first, by peft-mlm convert."
        )
    return ""


def scaling_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Give the factor s of a layer's change s B A, as PEFT computes it.

    Args:
        config: `adapter_config.json` of a LoRA adapter.
        name: Full name of the layer.
        rank: The layer's rank.

    Returns:
        alpha / r, or with rsLoRA alpha / √r.
    """
    alphas = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def state_of(parts: Parts) -> dict[str, torch.Tensor]:
    """Name what an adapter holds as PEFT does.

    Args:
        parts: The adapter, of scaling 1.

    Returns:
        Tensors by key, float32, none of them a view of another.
    """
    tensors = {}
    for name, change in parts.changes.items():
        embedding = change.kind == "embedding"
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = change.factors.a, change.factors.b
        tensors[f"{name}.{ends[0]}"] = a.reshape(len(a), *change.inputs)
        tensors[f"{name}.{ends[1]}"] = b.reshape(*b.shape, *change.tail)
        if change.bias is not None:
            tensors[f"{name}.lora_B.bias"] = change.bias
    for name, value in parts.whole.items():
        module, _, parameter = name.rpartition(".")
        inner = f"{module}.base_layer" if module in parts.changes else module
        tensors[f"{inner}.{parameter}"] = value
    for name, by_id in parts.rows.items():
        tensors[f"{name}.token_adapter.trainable_tokens_delta"] = torch.stack(list(by_id.values()))
    return {PREFIX + key: tensor.detach().float().clone().contiguous() for key, tensor in tensors.items()}


def write_parts(parts: Parts, folder: Path) -> None:
    """Write a plain LoRA adapter of scaling 1, in float32.

    Args:
        parts: What it holds; its config says which base it is for.
        folder: An existing folder.
    """
    save_file(state_of(parts), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    record = {name: sorted(v) if isinstance(v, set) else v for name, v in parts.config.items()}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def plain_config(
    like: Mapping[str, Any],
    changes: Mapping[str, Change],
    *,
    target_modules: str | Sequence[str],
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    rows: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Make the configuration of a plain LoRA adapter of scaling 1.

    Args:
        like: Configuration of an adapter for the same base.
        changes: What the adapter adds to weights: they give the ranks.
        target_modules: What PEFT finds these layers by.
        bias: PEFT's `bias`: "none", "all" or "lora_only".
        modules_to_save: PEFT's names of the modules that are put in place of the base's.
        rows: Ids of the token rows that are put in place of the base's, by the name of the matrix.

    Returns:
        `adapter_config.json`.
    """
    ranks = {name: change.factors.rank for name, change in changes.items()}
    values = list(ranks.values())
    usual = max(set(values), key=lambda rank: (values.count(rank), rank), default=1)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        bias=bias,
        lora_bias=any(change.bias is not None for change in changes.values()),
        modules_to_save=list(modules_to_save) or None,
        trainable_token_indices={name: list(ids) for name, ids in rows.items()} if rows else None,
        fan_in_fan_out=bool(like.get("fan_in_fan_out", False)),
        inference_mode=True,
    )
    record = {name: getattr(v, "value", v) for name, v in config.to_dict().items()}
    kept = ["auto_mapping", "base_model_name_or_path", "revision", "task_type"]
    if target_modules == like.get("target_modules"):
        kept += ["exclude_modules", "layers_to_transform", "layers_pattern"]
    return {**record, **{name: like[name] for name in kept if name in like}}


def _change(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Change:
    embedding = "lora_embedding_A" in tensors
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not set(ends) <= tensors.keys():
        raise AdapterError(f"{folder} holds only one of the two matrices of {name}. Take it from its source again.")
    a, b = (tensors[end].double() for end in ends)
    if len(a) != b.shape[1]:
        why = "several groups" if b.dim() > 2 else "ranks that do not agree"
        raise AdapterError(f"{folder}: the matrices of {name} have {why}, so that their product is no change of it.")
    scaling, bias = scaling_of(config, name, len(a)), tensors.get("lora_B.bias")
    return Change(
        factors=Factors(a.flatten(1), scaling * b.flatten(1)),
        kind="embedding" if embedding else "linear",
        inputs=tuple(a.shape[1:]),
        tail=tuple(b.shape[2:]),
        bias=None if bias is None else scaling * bias.double(),
    )


def _ids_of_rows(config: Mapping[str, Any], module: str) -> list[int]:
    """Give the ids of an adapter's trained rows, in the order of its file."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(given, list):  # PEFT's short form: of the embeddings
        return given
    return next((ids for key, ids in given.items() if module == key or module.endswith("." + key)), [])
