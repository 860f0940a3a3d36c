"""A short row of tokens that a model is tried on, and the mode in which that is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PROBE_TOKENS = 16


def probe_inputs(model: Any, rows: int = 1) -> dict[str, torch.Tensor]:
    """Make inputs of neighbouring ids, without padding.

    Args:
        model: A masked LM, with or without an adapter; its vocabulary and device are used.
        rows: How many rows the 16 tokens stand in.

    Returns:
        `input_ids` and `attention_mask`, (rows, 16 / rows) each.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=model.device).remainder(vocabulary).view(rows, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode.

    Args:
        model: Any model.

    Yields:
        Nothing; afterwards the model is in the mode it was in.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
