"""What a quantised base is, and what it takes in memory: told in the run's summary and in the card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.arguments import ModelArguments
from peft_mlm.quantization import modules_kept_float, parameter_count, quantised_layers


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


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Count the bytes of a base's weights by kind; a tied matrix is counted once, with the embeddings.

    Args:
        model: The base, on the meta device, its layers quantised where they will be.

    Returns:
        Bytes of `embeddings`, `encoder`, `norms`, `head` and `quantised` (with scales and tables).
    """
    of_encoder = {id(module) for module in model.base_model.modules()}
    taken = dict.fromkeys(("embeddings", "encoder", "norms", "head", "quantised"), 0)
    seen: set[int] = set()
    # Embeddings first: a decoder that is tied to them takes nothing more.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        is_norm = type(module).__name__.endswith("Norm")
        inside = "norms" if is_norm else "encoder" if id(module) in of_encoder else "head"
        kind = "embeddings" if isinstance(module, nn.Embedding) else inside
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, Linear4bit | Linear8bitLt) and name == "weight":
                taken["quantised"] += quantised_bytes(module)
            else:
                taken[kind] += _size(tensor)
    return taken


def quantised_bytes(layer: Linear4bit | Linear8bitLt) -> int:
    """Count what the weight of a quantised layer takes, scales and tables included.

    Args:
        layer: Not quantised yet.

    Returns:
        Bytes, as bitsandbytes stores them: for 4 bits half a byte a number, a float32 scale for each block of 64 and a
        table of 16 numbers, with double quantisation a byte for each scale, a float32 for each 256 of them, a table of
        256 and a mean; for 8 bits a byte a number and a float32 scale for each row.
    """
    count = layer.in_features * layer.out_features
    if isinstance(layer, Linear8bitLt):
        return count + 4 * layer.out_features
    blocks = math.ceil(count / 64)
    scales = 4 * blocks
    if layer.weight.compress_statistics:
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4
    return math.ceil(count / 2) + scales + 4 * 16


def quantise_outline(model: PreTrainedModel, arguments: ModelArguments, name: str) -> None:
    """Put the layers of a quantised base in place, without weights.

    Args:
        model: The base on the meta device; it is changed in place. Its norms become float32.
        arguments: Which bits, of which kind.
        name: Of the base, for messages.

    Raises:
        ModelError: No layer of this model type can be quantised.
    """
    kept = modules_kept_float(model, name)
    for layer_name, module in list(model.named_modules()):
        skipped = any(layer_name == one or layer_name.startswith(f"{one}.") for one in kept)
        if type(module) is nn.Linear and not skipped:
            model.set_submodule(layer_name, _quantised_layer(module, arguments))
        elif type(module).__name__.endswith("Norm"):
            module.float()
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = arguments.load_in_4bit, arguments.load_in_8bit


def _quantised_layer(linear: nn.Linear, arguments: ModelArguments) -> Linear4bit | Linear8bitLt:
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer: Any
    if arguments.load_in_8bit:
        threshold = arguments.llm_int8_threshold
        layer = Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=threshold, device="meta")
    else:
        chosen = arguments.bnb_4bit_compute_dtype
        layer = Linear4bit(
            *sizes,
            bias=bias,
            compute_dtype=None if chosen == "auto" else getattr(torch, chosen),
            compress_statistics=arguments.bnb_4bit_use_double_quant,
            quant_type=arguments.bnb_4bit_quant_type,
            device="meta",
        )
    layer.requires_grad_(False)
    if bias:
        layer.bias.data = layer.bias.data.float()  # it stays exact
    return layer


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
