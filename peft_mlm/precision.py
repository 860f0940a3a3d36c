"""Which types a run computes and holds weights in, where its user has left that open; what a GPU's matrix units may do.

A frozen base needs no float32 copy of its weights: with an adapter, on a GPU that has bfloat16, it is held in bfloat16,
and activations are computed in bfloat16 (autocast). What is trained (adapter, trained modules, new rows) and the loss
stay float32. Under autocast a frozen float32 weight would be cast anew in every forward pass. On a CPU, or where the
user has said anything about types, nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from peft_mlm.checkpoint import load_config
from peft_mlm.config import Arguments
from peft_mlm.errors import AdapterError, ArgumentsError
from peft_mlm.initialization import edits_base
from peft_mlm.model_types import MODEL_TYPES

# Any of these, given, says that the user has thought about types.
ABOUT_TYPES = ("dtype", "bf16", "fp16")
WHY = "default for an adapter on a GPU with bfloat16"
# Methods that rewrite the base's weights.
FLOAT32_METHODS = ("osf",)
# Paged optimisers whose plain form has another name.
UNPAGED = {"paged_adamw_32bit": "adamw_torch", "paged_ademamix_32bit": "ademamix"}


def settle_types(arguments: Arguments) -> Arguments:
    """Check what is said about types and optimiser, and choose the types where nothing is said.

    Args:
        arguments: All groups.

    Returns:
        The arguments that the run trains with, is recorded by and is evaluated with; a notice says what was chosen.

    Raises:
        ArgumentsError: The optimiser needs a GPU, and there is none.
        AdapterError: What is trained cannot be held in 16 bits.
        ModelError: There is no such model.
    """
    check_optimiser(arguments.training)
    check_types(arguments)
    name = arguments.model.model_name_or_path
    if name is None or arguments.peft is None or not on_gpu_with_bfloat16(arguments.training):
        return arguments
    return with_precision(arguments, load_config(name, arguments.model).model_type, has_bfloat16=True)


def on_gpu_with_bfloat16(training: Mapping[str, Any]) -> bool:
    """Tell whether a run goes to a CUDA GPU that computes in bfloat16 by itself (Ampere or newer).

    Args:
        training: Training arguments by name; with `use_cpu` no GPU is looked at.

    Returns:
        True if so.
    """
    if training.get("use_cpu") or not torch.cuda.is_available():
        return False
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def with_precision(arguments: Arguments, model_type: str, *, has_bfloat16: bool) -> Arguments:
    """Choose the types of a run whose user has said nothing about them.

    Args:
        arguments: All groups.
        model_type: Type of the base model.
        has_bfloat16: Whether the run goes to a GPU that has bfloat16.

    Returns:
        With an adapter and such a GPU: `bf16` on, and `dtype` bfloat16 where the base is not changed by the adapter's
        start and its biases are not trained; types that cannot run so are left in float32. Else the same arguments.
    """
    row = MODEL_TYPES.get(model_type)
    silent = all(arguments.sources.get(name, "default") == "default" for name in ABOUT_TYPES)
    if arguments.peft is None or not has_bfloat16 or not silent or row is None or not row.mixed_precision:
        return arguments
    chosen: dict[str, Any] = {"bf16": True}
    model = arguments.model
    if row.half and not _wants_float32(arguments):
        model = replace(model, dtype="bfloat16")
        chosen["dtype"] = model.dtype
    held = "holds the frozen base and computes" if "dtype" in chosen else "computes"
    return replace(
        arguments,
        model=model,
        training={**arguments.training, "bf16": True},
        sources=arguments.sources | dict.fromkeys(chosen, WHY),
        notices=[
            *arguments.notices,
            f"The run {held} in bfloat16, which this GPU has; what is trained is float32. For float32 throughout: "
            "--dtype float32.",
        ],
    )


def check_types(arguments: Arguments) -> None:
    """Refuse to train biases of the base in 16 bits, where small steps are lost in the rounding.

    Args:
        arguments: All groups.

    Raises:
        AdapterError: `bias` is asked for on a base in 16 bits.
    """
    if arguments.model.dtype in ("bfloat16", "float16") and _trains_biases(arguments):
        raise AdapterError(
            f"peft_config has bias {_options(arguments)['bias']}, which trains the base's own biases, and dtype "
            f"{arguments.model.dtype} would lose their small steps in rounding. Use --dtype float32 (with --bf16 for "
            "the computing), or leave bias out."
        )


def check_optimiser(training: Mapping[str, Any]) -> None:
    """Refuse an optimiser that moves its state between GPU and CPU memory where there is no GPU.

    Args:
        training: Training arguments by name.

    Raises:
        ArgumentsError: `optim` is a paged one, and the run goes to the CPU.
    """
    name = str(training.get("optim") or "")
    if name.startswith("paged_") and (training.get("use_cpu") or not torch.cuda.is_available()):
        raise ArgumentsError(
            f"optim is {name}, which moves its state between the memories of a CUDA GPU and the CPU, but this run goes "
            f"to the CPU. Use {UNPAGED.get(name, name.removeprefix('paged_'))}, or leave it out."
        )


def has_tf32() -> bool:
    """Tell whether the GPU multiplies float32 matrices as TF32: with 10 bits of their 23, and several times faster."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None


def _options(arguments: Arguments) -> Mapping[str, Any]:
    return (arguments.peft.peft_config if arguments.peft is not None else None) or {}


def _trains_biases(arguments: Arguments) -> bool:
    return _options(arguments).get("bias", "none") != "none"


def _wants_float32(arguments: Arguments) -> bool:
    peft = arguments.peft
    if peft is None or _trains_biases(arguments) or peft.peft_method in FLOAT32_METHODS:
        return True
    return edits_base(peft.init_lora_weights)
