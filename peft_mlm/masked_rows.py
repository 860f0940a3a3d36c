"""Rows of tokens with masks of one's own choice -> log probabilities at some of their positions.

Pseudo-likelihoods and scores of mutations ask a model about many copies of a text, each masked elsewhere. Rows of one
length make a batch, so that nothing is padded: the numbers of a row do not depend on those beside it, also for types
of models that do not keep padding apart. The head runs at the positions that are read, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.cross_entropy import cross_entropies
from peft_mlm.errors import ModelError
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import Door, base_of, find_door, sum_over_masked
from peft_mlm.probing import evaluating
from peft_mlm.quantization import is_quantised

# Tokens of a batch: enough for a processor's cores, or for a GPU's.
CPU_TOKENS_PER_BATCH = 4096
GPU_TOKENS_PER_BATCH = 32768

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class MaskedRow(NamedTuple):
    """A row, where it is masked, and where it is read.

    Attributes:
        ids: Its tokens, special ones included, (T,).
        masked: Positions that hold the mask token in place of their own.
        read: Positions whose log probabilities are wanted, in ascending order.
    """

    ids: Ids
    masked: Sequence[int]
    read: Sequence[int]


def log_probabilities(
    model: PreTrainedModel,
    rows: Sequence[MaskedRow],
    mask_id: int,
    *,
    candidates: Sequence[int] | None = None,
    max_tokens_per_batch: int | None = None,
    door: Door | Literal["find"] | None = "find",
    advance: Callable[[int], Any] = lambda rows: None,
) -> list[Numbers]:
    """Ask a model for log probabilities at some positions of masked rows.

    Args:
        model: A masked LM, with or without an adapter; it is run where it is, in evaluation mode.
        rows: The rows.
        mask_id: The mask token.
        candidates: Tokens whose log probabilities are wanted at each position that is read; None for the token that
            stands there in `ids`.
        max_tokens_per_batch: Rows times their length, at most; a longer row is a batch of its own. Default 4096 on a
            CPU, 32768 elsewhere. It changes speed and memory, and nothing else.
        door: From `find_door`, where the caller has it; None runs the head on every position.
        advance: Is told after each batch how many rows it had.

    Returns:
        For each row, in the order given, ln p in nats: (positions read,), or (positions read, candidates). Computed in
        float32, or in float64 where the model is.
    """
    most = batch_tokens(model) if max_tokens_per_batch is None else max_tokens_per_batch
    if door == "find":
        door = find_door(base_of(model))
    wanted = None if candidates is None else torch.tensor(list(candidates), device=model.device)
    found: list[Numbers] = [np.empty(0)] * len(rows)
    with evaluating(model), fused_lora(model), torch.no_grad():
        for numbers in batches_of([len(row.ids) for row in rows], most):
            batch = [rows[number] for number in numbers]
            values = _ask(model, batch, mask_id, wanted, door)
            ends = np.cumsum([len(row.read) for row in batch])
            for number, part in zip(numbers, np.split(values, ends[:-1]), strict=True):
                found[number] = part
            advance(len(batch))
    return found


def batch_tokens(model: PreTrainedModel) -> int:
    """Choose how many tokens a batch has.

    Args:
        model: A model, where it will run.

    Returns:
        Rows times their length, at most.
    """
    return CPU_TOKENS_PER_BATCH if model.device.type == "cpu" else GPU_TOKENS_PER_BATCH


def mask_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the mask token of a tokenizer.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        Its id.

    Raises:
        ModelError: It has none.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"This tokenizer ({type(tokenizer).__name__}) has no mask token: choose that of a masked language model."
        )
    return int(tokenizer.mask_token_id)


def batches_of(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Put rows of as many tokens into batches.

    Example:
        >>> list(batches_of([5, 3, 5, 5], 10))
        [[0, 2], [3], [1]]

    Args:
        lengths: Tokens of each row.
        max_tokens: Rows of a batch times their tokens, at most; a longer row is a batch of its own.

    Yields:
        Numbers of the rows of a batch; the longest first: what does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for length, same in groupby(order, lambda index: lengths[index]):
        group, size = list(same), max(1, max_tokens // length)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def to_gpu(model: PreTrainedModel) -> None:
    """Move a model to the GPU where there is one; quantised ones are there already.

    Args:
        model: Any model.
    """
    if torch.cuda.is_available() and not is_quantised(model):
        model.to("cuda")


def _ask(
    model: PreTrainedModel,
    batch: Sequence[MaskedRow],
    mask_id: int,
    candidates: torch.Tensor | None,
    door: Door | None,
) -> Numbers:
    """Run rows of one length, and give the log probabilities of all positions that are read, row after row."""
    ids = np.stack([row.ids for row in batch])
    masked, read = _places([row.masked for row in batch]), _places([row.read for row in batch])
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[read] = ids[read]
    ids[masked] = mask_id
    given = torch.from_numpy(ids).to(model.device)
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    pieces: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if candidates is None:
            pieces.append(-cross_entropies(logits, targets))
        else:
            exact = logits if logits.dtype == torch.float64 else logits.float()
            pieces.append(exact.log_softmax(dim=-1)[:, candidates])
        return logits.new_zeros(())

    # The pieces come in the order of the positions; their sum is of no use here.
    sum_over_masked(model, inputs, torch.from_numpy(labels).to(model.device), keep, door=door)
    return torch.cat(pieces).double().cpu().numpy()


def _places(positions: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Number the rows of positions: (row, position) of each, as an index of a matrix."""
    rows = np.repeat(np.arange(len(positions)), [len(some) for some in positions])
    return rows, np.array([position for some in positions for position in some], np.int64)
