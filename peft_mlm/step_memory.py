"""What a training step, or a batch of an evaluation, holds beside the weights: counted on tensors without values.

The step is that of `trainer.py`: head at masked positions alone, our cross-entropy, LoRA layers fused, the types of
mixed precision, activations kept or computed again. Nothing is computed, so that it takes a second and no memory. For a
CUDA GPU, which need not be there, the step runs as one for the CPU with the rules that differ on a GPU: which functions
autocast computes in float32, attention and dropout kernels that keep no matrix of scores, cross-entropy in one piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from peft_mlm.collator import DOCUMENT_IDS, IGNORE_INDEX
from peft_mlm.cross_entropy import CACHED_BYTES
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import Door, base_of, find_door, sum_over_masked
from peft_mlm.live_memory import LiveBytes, without_values
from peft_mlm.quantization import quantised_layers

# Functions that autocast computes in float32 on a CUDA GPU, of those that encoders call (PyTorch, "CUDA Ops that can
# autocast to float32"). On a CPU it leaves them in the type of their input.
IN_FLOAT32 = frozenset(
    ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "exp", "pow", "__pow__", "rsqrt", "sum", "norm",
     "cumsum", "prod", "log", "softplus", "reciprocal")
)  # fmt: skip
FIRST_LOOK = 8


@dataclass(frozen=True)
class Batch:
    """The batch that is planned for.

    Attributes:
        rows: Rows of it.
        tokens: Tokens per row.
        masked: Tokens of it that are predicted.
        padded: Whether its rows differ in length.
        documents: Whether its rows hold documents side by side.
    """

    rows: int
    tokens: int
    masked: int
    padded: bool = False
    documents: bool = False


@dataclass(frozen=True)
class Step:
    """How it is computed.

    Attributes:
        on_gpu: Whether for a CUDA GPU.
        half: Whether under autocast, in 16 bits.
        checkpointing: Whether activations are computed again instead of kept.
        accumulation: Batches of an optimiser step.
    """

    on_gpu: bool = False
    half: bool = False
    checkpointing: bool = False
    accumulation: int = 1


def door_of(model: Any) -> Door | None:
    """Find where a model's masked rows are picked, by shapes alone.

    Args:
        model: On any device, also meta.

    Returns:
        As `gathered_head.find_door`.
    """
    with without_values(model), dequantised(model), LiveBytes(masked=FIRST_LOOK):
        return find_door(model)


def training_bytes(model: nn.Module, door: Door | None, batch: Batch, step: Step) -> dict[str, int]:
    """Count what a step holds at its largest moment, beside weights and optimiser.

    Args:
        model: On any device, also meta; with or without an adapter; frozen as it is trained.
        door: Where its masked rows are picked.
        batch: Its size.
        step: How it is computed.

    Returns:
        Bytes of `activations`, `logits` (with their gradient) and `gradients`, at that moment.
    """
    base = base_of(model)
    with _checkpointing(base, step.checkpointing), without_values(model), dequantised(model):
        counter = _counter(model, batch)
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: counter.rename(p.grad, "gradients"))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        was_training = model.training
        model.train()
        try:
            with counter, fused_lora(model), _as_accelerated(model, step):
                inputs, labels = _inputs(batch)
                for _ in range(min(step.accumulation, 2)):  # the gradients of the first lie beside the second
                    with _rules(step), _types(step):
                        loss = sum_over_masked(model, inputs, labels, _Loss(step).of, door=door)
                    with _rules(step):
                        _backward(loss)
                    del loss
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
    return {"activations": 0, "logits": 0, "gradients": 0} | counter.peak


def evaluation_bytes(model: nn.Module, door: Door | None, batch: Batch, step: Step) -> dict[str, int]:
    """Count what a batch of an evaluation holds at its largest moment, beside the weights.

    Args:
        model: As for `training_bytes`.
        door: Where its masked rows are picked.
        batch: Its size.
        step: How it is computed.

    Returns:
        Bytes of `activations` and `logits` at that moment.
    """
    with without_values(model), dequantised(model), torch.no_grad():
        counter = _counter(model, batch)
        with counter, _rules(step), _types(step):
            inputs, labels = _inputs(batch)
            sum_over_masked(model, inputs, labels, _Loss(step).of, door=door)
    return {"activations": 0, "logits": 0} | counter.peak


def _counter(model: nn.Module, batch: Batch) -> LiveBytes:
    vocabulary = int(base_of(model).get_input_embeddings().weight.shape[0])

    def kind(tensor: torch.Tensor) -> str:
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == vocabulary and tensor.is_floating_point()
        return "logits" if is_logits else "activations"

    held = [*model.parameters(), *model.buffers()]
    return LiveBytes(masked=batch.masked, padded=batch.padded, kind=kind, held=held)


def _inputs(batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if batch.documents:
        inputs[DOCUMENT_IDS] = torch.ones_like(ids)
    return inputs, torch.full_like(ids, IGNORE_INDEX)


@contextlib.contextmanager
def _checkpointing(base: Any, on: bool) -> Iterator[None]:
    """Switch checkpointing as the trainer does."""
    if not on:
        yield
        return
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()
    try:
        yield
    finally:
        base.activation_checkpointing_disable()


def _backward(loss: torch.Tensor) -> None:
    """Go backwards; `loss.backward()` would hide a mode that is on from the layers that run again."""
    options = {"allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)


@contextlib.contextmanager
def _as_accelerated(model: nn.Module, step: Step) -> Iterator[None]:
    """Give outputs in float32 under mixed precision, as accelerate makes a model do while it is trained."""
    if not step.half:
        yield
        return
    before = vars(model).get("forward")
    model.forward = convert_outputs_to_fp32(model.forward)
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def _types(step: Step) -> Any:
    """The types in which a step computes forwards."""
    return torch.autocast("cpu", torch.bfloat16) if step.half else contextlib.nullcontext()


def _rules(step: Step) -> Any:
    """The rules of the device, also where layers run again in the backward pass."""
    return _AsOnGpu(half=step.half) if step.on_gpu else contextlib.nullcontext()


class _AsOnGpu(TorchFunctionMode):
    """Calls functions as they run on a CUDA GPU, where memory differs: dropout, attention, float32 under autocast."""

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            # its kernels keep the state of the random numbers, not a mask
            return func(*args[:4], **{**kwargs, "dropout_p": 0.0})
        if name == "dropout" and func is nn.functional.dropout:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            if given.get("training", True) and given.get("p", 0.5) > 0:
                return torch.native_dropout(given["input"], given["p"], True)[0]  # a mask of bytes
            return given["input"]
        if self.half and name in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_in_float32(value) for value in args)
            kwargs = {key: _in_float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


class _Loss:
    """Takes the memory of `cross_entropy` without going through the vocabulary row by row, as it does on a CPU."""

    def __init__(self, step: Step) -> None:
        self.on_gpu = step.on_gpu

    def of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give a loss; (n, V) and (n) -> a number."""
        loss: torch.Tensor = _LossBytes.apply(logits, self.on_gpu)
        return loss


class _LossBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, on_gpu: bool) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.on_gpu = on_gpu
        _LossBytes.between(logits, on_gpu)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(logits)
        _LossBytes.between(logits, ctx.on_gpu)
        return result, None

    @staticmethod
    def between(logits: torch.Tensor, on_gpu: bool) -> None:
        """Make what is between: all rows in float32 on a GPU, a few at a time on a CPU."""
        if on_gpu:
            some = torch.empty_like(logits, dtype=torch.float32)
        else:
            some = logits.new_empty(2 * min(logits.numel(), CACHED_BYTES // 4))
        del some


@contextlib.contextmanager
def dequantised(model: nn.Module) -> Iterator[None]:
    """Let quantised layers make float weights for each product and free them after it, as bitsandbytes does.

    Args:
        model: With layers of bitsandbytes that hold no weights.

    Yields:
        Nothing.
    """
    layers = list(quantised_layers(model).values())
    for layer in layers:
        layer.forward = _forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_of(layer: Linear4bit | Linear8bitLt) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        computes = layer.compute_dtype or dtype if isinstance(layer, Linear4bit) else dtype
        with torch.autocast("cpu", enabled=False):
            result: torch.Tensor = _Dequantised.apply(x.to(computes), layer.out_features)
            result = result if layer.bias is None else result + layer.bias.to(computes)
        return result.to(x.dtype)

    return forward


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None
