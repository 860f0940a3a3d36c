"""What a run writes of its model: the adapter with all that belongs to it, or the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_mlm.adapter import save_adapter
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import write_base_recipe
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.initialization import Matrices, rewrite_for_untouched_base
from peft_mlm.rank_schedule import settle_ranks


def saver(
    *,
    base_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_changed: bool,
    base_revision: str | None = None,
    base_arguments: ModelArguments | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    initial: Mapping[str, Matrices] | None = None,
) -> Callable[[torch.nn.Module, Path], None]:
    """Make the function that writes what was trained.

    Args:
        base_name: The base's name as it may be published.
        tokenizer: The tokenizer of the run.
        tokenizer_changed: Whether the adapter must carry it.
        base_revision: The base's commit on the hub.
        base_arguments: How the base was loaded, to be kept beside the adapter.
        fingerprint: What tells the base from others, to be kept beside the adapter.
        initial: (A0, B0) by layer, where their product was taken out of the base: what is written fits the base as it
            was.

    Returns:
        A function of the model and a folder: it writes the adapter alone, or the whole model with its tokenizer.
    """

    def save(model: torch.nn.Module, folder: Path) -> None:
        if isinstance(model, PeftModel):
            carried = tokenizer if tokenizer_changed else None
            settle_ranks(model)
            with warnings.catch_warnings():
                # a layer that AdaLoRA has cut to rank 0 is taken for an incomplete shard
                warnings.filterwarnings("ignore", message=".*invalid shape", category=UserWarning)
                save_adapter(model, folder, base_name=base_name, base_revision=base_revision, tokenizer=carried)
            if initial:
                rewrite_for_untouched_base(folder, initial)
            if base_arguments is not None:
                write_base_recipe(base_arguments, folder)
            if fingerprint:
                write_fingerprint(fingerprint, folder)
        else:
            model.save_pretrained(str(folder))  # type: ignore[operator]
            tokenizer.save_pretrained(str(folder))

    return save
