"""What a quantised base is, and what it takes in memory: told in the run's summary and in the card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.quantization import parameter_count, quantised_layers


def describe_quantisation(model: PreTrainedModel) -> dict[str, Any] | None:
    """Describe a quantised base: its bits, what they apply to, and what it takes.

    Args:
        model: The base, without adapter.

    Returns:
        `bits`, `kind` (nf4, fp4 or int8), `double_quant`, `compute_dtype` (None for 8 bits), `layers` (how many),
        `kept_float` (names of modules), `quantised_head` (names of layers), `memory`; None for a float base.
    """
    layers = quantised_layers(model)
    if not layers:
        return None
    first = next(iter(layers.values()))
    four = isinstance(first, Linear4bit)
    encoder = {id(module) for module in model.base_model.modules()}
    return {
        "bits": 4 if four else 8,
        "kind": first.weight.quant_type if four else "int8",
        "double_quant": bool(four and first.weight.quant_state.nested),
        "compute_dtype": str(first.compute_dtype).removeprefix("torch.") if four else None,
        "layers": len(layers),
        "kept_float": model.config.quantization_config.llm_int8_skip_modules,
        "quantised_head": [name for name, layer in layers.items() if id(layer) not in encoder],
        "memory": describe_memory(model),
    }


def describe_memory(model: PreTrainedModel) -> dict[str, int]:
    """Count the bytes that a base's tensors take, as stored; memory that several share is counted once.

    Args:
        model: The base, without adapter.

    Returns:
        Bytes of `quantised` (weights of quantised layers with their scales and tables), `embeddings`, `head`, `other`
        (norms, biases, buffers), `total`; and what all its weights would take as `float32` and as `bfloat16`.
    """
    encoder = {id(module) for module in model.base_model.modules()}
    seen: set[int] = set()
    taken = dict.fromkeys(("quantised", "embeddings", "head", "other"), 0)
    # Embeddings first: a decoder that is tied to them takes nothing more.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        part = "embeddings" if isinstance(module, nn.Embedding) else "other" if id(module) in encoder else "head"
        for is_weight, tensor in _tensors(module):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                taken["quantised" if is_weight else part] += storage.nbytes()
    weights = sum(parameter_count(parameter) for parameter in model.parameters())
    return {**taken, "total": sum(taken.values()), "float32": 4 * weights, "bfloat16": 2 * weights}


def _tensors(module: nn.Module) -> Iterator[tuple[bool, torch.Tensor]]:
    """Give a module's own tensors, and whether they belong to a quantised weight."""
    for name, parameter in module.named_parameters(recurse=False):
        is_weight = isinstance(module, Linear4bit | Linear8bitLt) and name == "weight"
        yield is_weight, parameter.data
    for buffer in module.buffers(recurse=False):
        yield False, buffer
    if isinstance(module, Linear4bit):
        state = module.weight.quant_state
        extra = [state.absmax, state.code]
        extra += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        yield from ((True, tensor) for tensor in extra)
    elif isinstance(module, Linear8bitLt):
        yield True, module.weight.SCB if module.weight.SCB is not None else module.state.SCB
