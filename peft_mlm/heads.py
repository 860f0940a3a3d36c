"""The masked LM head: which modules make it up, which of them share weights with the embeddings, which are fresh.

A *tied* parameter is one that the model uses in more than one place, such as the embedding matrix that is the decoder
too. A PEFT copy of a module that holds one (`modules_to_save`) would cut the tie, and what is saved afterwards loses
the decoder's bias; so only modules without tied parameters are trained in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.errors import AdapterError


@dataclass(frozen=True)
class FreshHead:
    """What to do about head parameters that no checkpoint brought.

    Attributes:
        modules: Names of the modules to train in full and to ship with the adapter.
        left_at_zero: Names of parameters that stay as they start, at zero: biases bound to the decoder's matrix.
    """

    modules: tuple[str, ...]
    left_at_zero: tuple[str, ...]


def tied_parameters(model: nn.Module) -> set[int]:
    """Give the ids (`id(parameter)`) of the parameters that stand in more than one place of the model."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in places.items() if count > 1}


def encoder_parameters(model: PreTrainedModel) -> set[int]:
    """Give the ids (`id(parameter)`) of the encoder's parameters; none where the model does not tell it apart."""
    return set() if model.base_model is model else {id(parameter) for parameter in model.base_model.parameters()}


def untied_modules(model: nn.Module, name: str) -> list[str]:
    """Break a module into its parts that hold parameters of their own and no tied one.

    Args:
        model: The masked LM.
        name: Full name of one of its modules.

    Returns:
        The module itself where none of its parameters is tied; else the full names of the smallest modules below it
        whose parameters are all their own.
    """
    tied = tied_parameters(model)
    parameters = list(model.get_submodule(name).parameters())
    if parameters and not any(id(parameter) in tied for parameter in parameters):
        return [name]
    found = []
    for below, module in model.get_submodule(name).named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(module.children()) and not any(id(parameter) in tied for parameter in own):
            found.append(f"{name}.{below}" if below else name)
    return found


def outermost(names: Iterable[str]) -> list[str]:
    """Leave out the modules that lie inside another one of the list.

    Args:
        names: Full names of modules.

    Returns:
        The others, sorted.
    """
    every = sorted(set(names))
    return [name for name in every if not any(name.startswith(f"{other}.") for other in every)]


def plan_fresh_head(model: PreTrainedModel, fresh_parameters: Iterable[str]) -> FreshHead:
    """Decide how a head that the checkpoint does not hold is trained beside an adapter.

    Args:
        model: The masked LM, as loaded.
        fresh_parameters: Names of the parameters that the checkpoint did not bring.

    Returns:
        The modules to train and ship; and the biases that share a module with the decoder's matrix: these can't be
        shipped by PEFT without a copy of the whole matrix, and stay at their zero, which every load gives again.

    Raises:
        AdapterError: A fresh parameter is neither in a module of its own nor zero.
    """
    fresh = set(fresh_parameters)
    tied = tied_parameters(model)
    decoder = model.get_output_embeddings()
    modules: set[str] = set()
    left = []
    for name in sorted(fresh):
        owner, _, _ = name.rpartition(".")
        module = model.get_submodule(owner)
        leaf = not any(module.children())
        at_zero = torch.count_nonzero(model.get_parameter(name)) == 0
        # A whole matrix is not shipped for a bias that every load starts at zero.
        costly = module is decoder and f"{owner}.weight" not in fresh and at_zero
        if leaf and not costly and not any(id(parameter) in tied for parameter in module.parameters()):
            modules.add(owner)
        elif at_zero:
            left.append(name)
        else:
            raise AdapterError(
                f"The checkpoint does not hold {name}, which starts at random and shares its module with other "
                "weights, so that an adapter cannot ship it. Train the whole model instead (without --use_lora)."
            )
    return FreshHead(tuple(sorted(modules)), tuple(left))


def encoder_layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Name the layers of an encoder.

    Args:
        base: The masked LM.

    Returns:
        The members of its longest list of modules by full name, in their order; empty where it has none.
    """
    lists = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and name.startswith(f"{base.base_model_prefix}.")
    }
    if not lists:
        return {}
    name = max(lists, key=lambda one: (len(lists[one]), sum(p.numel() for p in lists[one].parameters())))
    return {f"{name}.{number}": layer for number, layer in enumerate(lists[name])}
