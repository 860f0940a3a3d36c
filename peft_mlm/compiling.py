"""The encoder's layers compiled (`--torch_compile`), the rest of a model left as it is.

A whole model would be compiled anew for every number of masked tokens, since the head runs on these alone. Its layers
see (B, T, H) only, are alike, and share what is compiled; from the second shape on, sizes are variables of the compiled
code. The layer within which masked rows are picked stays out: its rows change in number too.
"""

from __future__ import annotations

import importlib.util
import shutil

import torch
import torch._dynamo
from transformers import PreTrainedModel

from peft_mlm.errors import ArgumentsError
from peft_mlm.gathered_head import Door
from peft_mlm.heads import encoder_layers

# Graphs of one layer's code before it runs uncompiled: its kinds (local and global attention, first layer, training and
# evaluation) times its shapes (the first, one with other lengths, one with other numbers of rows, a single row).
GRAPHS_AT_MOST = 64


def compile_layers(base: PreTrainedModel, door: Door | None, *, backend: str, mode: str | None, device: str) -> int:
    """Let the layers of an encoder run compiled; names of parameters and modules stay.

    Args:
        base: The masked LM, with an adapter's layers in it or not; changed in place.
        door: Where masked rows are picked.
        backend: `torch_compile_backend`, such as inductor.
        mode: `torch_compile_mode`, or None.
        device: Type of the device that it runs on, such as cuda.

    Returns:
        How many layers are compiled.

    Raises:
        ArgumentsError: What the backend builds with is not installed.
    """
    if backend == "inductor":
        _check_tools(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_AT_MOST)
    layers = {name: layer for name, layer in encoder_layers(base).items() if door is None or not _within(door, name)}
    for layer in layers.values():
        layer.compile(backend=backend, mode=mode)
    return len(layers)


def _within(door: Door, layer: str) -> bool:
    return door.last_layer is not None and door.last_layer.startswith(f"{layer}.")


def _check_tools(device: str) -> None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise ArgumentsError("torch_compile needs the package triton on a GPU: pip install triton, or leave it out.")
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise ArgumentsError(
            "torch_compile needs a C++ compiler on the CPU (g++ or clang++): install one, or leave it out."
        )
