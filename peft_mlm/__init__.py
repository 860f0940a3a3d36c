"""Adapt masked language models: train an adapter, measure it, ship it, merge it.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_mlm.commands.evaluate import evaluate
    from peft_mlm.commands.fill_mask import fill_mask
    from peft_mlm.commands.inspect_adapter import inspect
    from peft_mlm.commands.merge import merge
    from peft_mlm.commands.push import push
    from peft_mlm.commands.train import train
    from peft_mlm.commands.verify import verify
    from peft_mlm.loading import load

__version__ = "0.1.0"

__all__ = ["evaluate", "fill_mask", "inspect", "load", "merge", "push", "train", "verify"]

_MODULES = {
    "train": "peft_mlm.commands.train",
    "evaluate": "peft_mlm.commands.evaluate",
    "fill_mask": "peft_mlm.commands.fill_mask",
    "merge": "peft_mlm.commands.merge",
    "push": "peft_mlm.commands.push",
    "inspect": "peft_mlm.commands.inspect_adapter",
    "verify": "peft_mlm.commands.verify",
    "load": "peft_mlm.loading",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'peft_mlm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
