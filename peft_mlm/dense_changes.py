"""Two models of one architecture -> what the second adds to the first, as LoRA and what is left beside it.

Whatever a method does to its weights, merged it has added something to them; so has training the whole model. Each
matrix of such a change is brought to a rank by its truncated singular value decomposition. PEFT has a function of its
own for this (`convert_to_lora`, peft 0.21.2): it refuses methods that it could convert (OFT, (IA)³) and adapters with
trained biases, names the tensors of trained modules wrong that have parts, and leaves trained token rows out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mlm.console import few_names
from peft_mlm.deltas import Change
from peft_mlm.errors import AdapterError
from peft_mlm.low_rank import Loss, truncate_dense


@dataclass(frozen=True)
class Layer:
    """How LoRA's matrices of a layer lie to its weight.

    Attributes:
        kind: "linear" or "embedding", as in `Change`.
        inputs: Shape of the matrix A, without its rank.
        tail: Shape of the matrix B, after its rank.
        transposed: Whether the weight is kept as (in, out).
    """

    kind: Literal["linear", "embedding"]
    inputs: tuple[int, ...]
    tail: tuple[int, ...]
    transposed: bool

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Turn a weight, or its change, to what LoRA's b @ a equals: (out, in), of embeddings (size, tokens)."""
        return weight.T if self.transposed else weight.flatten(1)


def layer_of(module: nn.Module) -> Layer | None:
    """Say how LoRA's matrices of a module lie to its weight.

    Args:
        module: A module of the base.

    Returns:
        None where LoRA has no matrices for it.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    if isinstance(module, nn.Linear):
        return Layer("linear", (weight.shape[1],), (), transposed=False)
    if isinstance(module, Conv1D):
        return Layer("linear", (weight.shape[0],), (), transposed=True)
    if isinstance(module, nn.Embedding):
        return Layer("embedding", (weight.shape[0],), (), transposed=True)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        return Layer("linear", tuple(weight.shape[1:]), (1,) * (weight.dim() - 2), transposed=False)
    return None


def check_same_make(base: nn.Module, other: nn.Module) -> None:
    """Refuse two models that have no difference.

    Args:
        base: A model.
        other: Another one.

    Raises:
        AdapterError: The models have other parameters, or of other shapes.
    """
    mine, theirs = dict(base.named_parameters()), dict(other.named_parameters())
    odd = sorted(mine.keys() ^ theirs.keys())
    odd += [name for name in mine.keys() & theirs.keys() if mine[name].shape != theirs[name].shape]
    if odd:
        raise AdapterError(
            f"The two models are not of one make: {few_names(odd, 3)} are not in both, or of other shapes."
        )


def parameter_changes(base: nn.Module, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Subtract the parameters of a model from others of the same names.

    Args:
        base: The model.
        other: Tensors by the names of its parameters, or of some of them.

    Returns:
        Differences that are not zero, in float64; of a tied parameter one.
    """
    changes = {}
    for name, parameter in base.named_parameters():
        if name in other:
            change = other[name].detach().cpu().double() - parameter.detach().cpu().double()
            if change.any():
                changes[name] = change
    return changes


def merged_parameters(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Merge an adapter and give the base's parameters as they are then, by their names in the base.

    PEFT's `merge_and_unload` fails for most methods beside a trained module that has parts (peft 0.21.2).

    Args:
        adapted: The base with the adapter, which is merged in place.

    Returns:
        Parameters; those of trained modules and rows of tokens are the base's, unmerged.

    Raises:
        AdapterError: The method cannot be merged.
    """
    try:
        adapted.merge_adapter(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"The adapter cannot be merged, and so not be made LoRA: {error}") from error
    every = adapted.get_base_model().named_parameters(remove_duplicate=False)
    return {re.sub(r"\.(base_layer|original_module)\.", ".", name): parameter for name, parameter in every}


def lower_rank(
    changes: Mapping[str, torch.Tensor], model: nn.Module, layers: Collection[str], rank: int | None
) -> tuple[dict[str, Change], dict[str, Loss]]:
    """Bring the changes of some layers' weights to a rank.

    Args:
        changes: Changes by parameter; a layer without one gets matrices of zero.
        model: The base, which has these layers.
        layers: Names of linear layers, convolutions of one group or embeddings.
        rank: The rank; None for the lowest that loses nothing but rounding.

    Returns:
        What LoRA adds to each layer, and what is lost of it.
    """
    found, losses = {}, {}
    for name in layers:
        module = model.get_submodule(name)
        layer = layer_of(module)
        assert layer is not None
        weight = module.get_parameter("weight")
        change = changes.get(f"{name}.weight", torch.zeros(weight.shape, dtype=torch.float64))
        factors, losses[name] = truncate_dense(layer.as_matrix(change), rank)
        found[name] = Change(factors, layer.kind, layer.inputs, layer.tail)
    return found, losses


def is_smaller(changes: Mapping[str, Change]) -> bool:
    """Tell whether LoRA's matrices have fewer numbers than the weights they are added to."""
    factors = [change.factors for change in changes.values()]
    numbers = sum(f.a.numel() + f.b.numel() for f in factors)
    return numbers < sum(len(f.b) * f.a.shape[1] for f in factors)


def describe_ranks(changes: Mapping[str, Change]) -> str:
    """Say what some ranks would lose of changes that are given whole.

    Args:
        changes: By layer, of a rank that loses nothing.

    Returns:
        Such as `8 loses 41%, 32 loses 7%`.
    """
    spectra = [change.factors.a.norm(dim=1).square() for change in changes.values()]  # a = √s vᵀ: s, sorted
    total = sum(float(s.square().sum()) for s in spectra)
    told = []
    for rank in (4, 8, 16, 32, 64, 128):
        lost = sum(float(s[rank:].square().sum()) for s in spectra)
        told.append(f"{rank} loses {(lost / total) ** 0.5:.2%}")
        if lost == 0:
            break
    return ", ".join(told)
