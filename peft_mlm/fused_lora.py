"""LoRA's layers with fewer passes over memory while a model is trained: the same numbers, to rounding.

PEFT adds the low-rank part to a layer's output by three kernels that each read and write a whole activation (B's
product, its scaling, the sum), and as many in the backward pass. Here both parts are accumulated in place by the
matrix products themselves: y = x Wᵀ + b, then y += s (x Aᵀ) Bᵀ (Hu et al. 2021, equation 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Let plain LoRA layers run fused within a `with` block.

    Layers with a variant (DoRA and the like), a bias of LoRA's own, dropout, several active adapters, or a base that is
    quantised or trained go on by PEFT's own code; so does a layer while it is merged or switched off.

    Args:
        model: A model with or without LoRA layers.

    Yields:
        How many layers are fused.
    """
    layers = [module for module in model.modules() if _can_be_fused(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _can_be_fused(layer: Any) -> bool:
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return False
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(adapters) != 1 or layer.lora_variant:
        return False
    dropout, (name,) = layer.lora_dropout[adapters[0]], adapters
    return (
        layer.lora_B[name].bias is None
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)
    )


def _forward(layer: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(names) == 1 and not (args or options or layer.disable_adapters or layer.merged)
    if not plain:
        return type(layer).forward(layer, x, *args, **options)
    base, (name,) = layer.base_layer, names
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    device, weight, bias = x.device.type, base.weight, base.bias
    # Views are taken out here: a model may change the result in place (DeBERTa), which views made within forbid.
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            result = _LoRALinear.apply(rows.to(dtype), weight.to(dtype), bias, a, b, scaling)
    elif x.dtype == weight.dtype == a.dtype == b.dtype:
        result = _LoRALinear.apply(rows, weight, bias, a, b, scaling)
    else:
        # PEFT then computes its part in the adapter's type: its own code keeps to that.
        return type(layer).forward(layer, x)
    viewed: torch.Tensor = result.view(*x.shape[:-1], -1)
    return viewed


class _LoRALinear(torch.autograd.Function):
    """Rows (n, in) -> (n, out), with gradients for x, A (r, in) and B (out, r) only."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        low_a, low_b = a.to(rows.dtype), b.to(rows.dtype)
        inner = rows @ low_a.T
        result = nn.functional.linear(rows, weight, bias).addmm_(inner, low_b.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, low_a, low_b, inner)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weight, a, b, inner = ctx.saved_tensors
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        of_x = of_a = of_b = None
        if for_x or for_a:
            of_inner = (gradient @ b).mul_(ctx.scaling)
            if for_x:
                of_x = (gradient @ weight).addmm_(of_inner, a)
            if for_a:
                of_a = (of_inner.T @ rows).to(ctx.dtypes[0])
        if for_b:
            of_b = (gradient.T @ inner).mul_(ctx.scaling).to(ctx.dtypes[1])
        return of_x, None, None, of_a, of_b, None
