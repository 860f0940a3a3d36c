"""How much an adapter changes each layer, told from its file alone.

LoRA adds s B A to a weight (Hu et al. 2021, https://arxiv.org/abs/2106.09685), with s = alpha / r, or alpha / sqrt(r)
for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). The product is as large as the weight; its Frobenius
norm needs only two matrices of r x r: |B A|^2 = trace((B^T B) (A A^T)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_mlm.safetensors_header import Header, read_values

if TYPE_CHECKING:
    import numpy as np

WRAPPED = "base_model.model."
# Names of the two matrices of a low-rank product, and the places where a tensor's name ends in them.
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
# An expression with more of these, or with one behind a group, can take for ever on a name made for it.
MANY_WAYS, MOST_WAYS, LONGEST_KEY = re.compile(r"[*+?{|]"), 2, 300


@dataclass(frozen=True)
class LayerNorms:
    """One layer of an adapter.

    Attributes:
        name: The layer in the base.
        rank: Rank of its low-rank product; None for other methods.
        scaling: What the product is multiplied by; None where it is not known.
        norms: Frobenius norm of each tensor, by the rest of its name.
        delta_norm: Frobenius norm of what is added to the weight; None where the method adds no low-rank product.
    """

    name: str
    rank: int | None
    scaling: float | None
    norms: Mapping[str, float]
    delta_norm: float | None


def layer_norms(header: Header, config: Mapping[str, Any]) -> list[LayerNorms]:
    """Measure every layer of an adapter.

    Args:
        header: Of its weights; their types must be ones that numpy reads.
        config: Its `adapter_config.json`.

    Returns:
        The layers, sorted as people count (layer 2 before layer 10).

    Raises:
        DamagedFileError: A type cannot be read, or the file was cut off meanwhile.
    """
    tensors: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        layer, rest = split_name(name)
        tensors.setdefault(layer, {})[rest] = name
    return [_layer(layer, parts, header, config) for layer, parts in sorted(tensors.items(), key=_as_people_count)]


def split_name(name: str) -> tuple[str, str]:
    """Split the name of an adapter's tensor into the base's layer and the rest.

    Args:
        name: As in the file.

    Returns:
        (layer, rest); the layer of what all layers share is empty.
    """
    short = name.removeprefix(WRAPPED)
    for ending in (ending for pair in PAIRS for ending in pair):
        if short.endswith(f".{ending}"):
            return short.removesuffix(f".{ending}"), ending
    for mark in (".lora_", ".token_adapter.", ".ia3_", ".vera_", ".hada_", ".lokr_", ".oft_", ".boft_"):
        at = short.find(mark)
        if at > 0:
            return short[:at], short[at + 1 :]
    layer, _, rest = short.rpartition(".")
    return layer, rest


def scaling_of(layer: str, rank: int, config: Mapping[str, Any]) -> float | None:
    """Compute what PEFT multiplies a LoRA product by; `deltas.scaling_of` asks PEFT itself, which takes torch.

    Args:
        layer: The layer in the base.
        rank: Its rank.
        config: The adapter's configuration, perhaps a stranger's.

    Returns:
        alpha / r, or alpha / sqrt(r) for rsLoRA; None where alpha is no number, or where an expression in
        `alpha_pattern` is too intricate to be tried on names that a stranger chose.
    """
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(layer) > LONGEST_KEY:
        return None
    for key, value in patterns.items():
        if len(key) > LONGEST_KEY or len(MANY_WAYS.findall(key)) > MOST_WAYS or re.search(r"\)[*+?{]", key):
            return None
        try:
            if re.match(rf"(.*\.)?({key})$", layer):
                alpha = value
                break
        except (re.error, OverflowError, RecursionError):
            return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or rank < 1:
        return None
    try:
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except OverflowError:
        return None


def _layer(layer: str, parts: Mapping[str, str], header: Header, config: Mapping[str, Any]) -> LayerNorms:
    import numpy as np

    values = {rest: read_values(header, name) for rest, name in parts.items()}
    with np.errstate(all="ignore"):
        norms = {rest: float(np.sqrt(np.square(array, dtype=np.float64).sum())) for rest, array in values.items()}
        for first, second in PAIRS:
            if config.get("peft_type") == "LORA" and first in values and second in values:
                rank = values[first].shape[0] if values[first].ndim else 0
                scaling, product = scaling_of(layer, rank, config), _product_norm(values[first], values[second])
                known = scaling is not None and product is not None
                return LayerNorms(layer, rank, scaling, norms, scaling * product if known else None)  # type: ignore[operator]
    return LayerNorms(layer, None, None, norms, None)


def _product_norm(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    """Norm of B A for A (r, ...) and B (..., r); of a convolution, B is (out, r, 1, 1)."""
    import numpy as np

    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or b[0:1, 0:1].size > 1:
        return None
    flat_a, flat_b = a.reshape(a.shape[0], -1).astype(np.float64), b.reshape(b.shape[0], -1).astype(np.float64)
    square = float(((flat_a @ flat_a.T) * (flat_b.T @ flat_b)).sum())
    return math.sqrt(square) if square > 0 else square if math.isnan(square) else 0.0


def _as_people_count(item: tuple[str, Any]) -> list[tuple[int, str]]:
    return [(int(part[:9]), "") if part[:9].isdecimal() else (-1, part) for part in item[0].split(".")]
