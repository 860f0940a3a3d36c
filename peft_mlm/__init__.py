"""Adapt masked language models: train an adapter, measure it, ship it, merge it.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_mlm.adapter_set import load
    from peft_mlm.commands.combine import combine
    from peft_mlm.commands.compare import compare
    from peft_mlm.commands.convert import convert
    from peft_mlm.commands.doctor import doctor
    from peft_mlm.commands.evaluate import evaluate
    from peft_mlm.commands.export import export
    from peft_mlm.commands.extract import extract
    from peft_mlm.commands.fill_mask import fill_mask
    from peft_mlm.commands.inspect_adapter import inspect
    from peft_mlm.commands.merge import merge
    from peft_mlm.commands.plan import plan
    from peft_mlm.commands.playground import playground
    from peft_mlm.commands.push import push
    from peft_mlm.commands.report import report
    from peft_mlm.commands.score import score
    from peft_mlm.commands.train import train
    from peft_mlm.commands.verify import verify

__version__ = "0.1.0"

__all__ = [
    "combine",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "extract",
    "fill_mask",
    "inspect",
    "load",
    "merge",
    "plan",
    "playground",
    "push",
    "report",
    "score",
    "train",
    "verify",
]

_MODULES = {
    "train": "peft_mlm.commands.train",
    "combine": "peft_mlm.commands.combine",
    "compare": "peft_mlm.commands.compare",
    "convert": "peft_mlm.commands.convert",
    "doctor": "peft_mlm.commands.doctor",
    "evaluate": "peft_mlm.commands.evaluate",
    "extract": "peft_mlm.commands.extract",
    "fill_mask": "peft_mlm.commands.fill_mask",
    "merge": "peft_mlm.commands.merge",
    "export": "peft_mlm.commands.export",
    "playground": "peft_mlm.commands.playground",
    "push": "peft_mlm.commands.push",
    "report": "peft_mlm.commands.report",
    "score": "peft_mlm.commands.score",
    "plan": "peft_mlm.commands.plan",
    "inspect": "peft_mlm.commands.inspect_adapter",
    "verify": "peft_mlm.commands.verify",
    "load": "peft_mlm.adapter_set",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'peft_mlm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
