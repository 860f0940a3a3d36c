"""Cross-entropy over a large vocabulary, a few rows at a time, so that what is between stays in the processor's cache.

For a row of logits z and its token t: loss = lse(z) - z_t with lse(z) = ln sum_v exp z_v, and d loss / d z = softmax(z)
less the target. The library's own function writes and reads the whole (n, V) matrix eight times for these; here it is
read once forwards, and read and written once backwards. With label smoothing s the target is (1 - s) at t plus s / V
everywhere (Szegedy et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# What a CPU's second-level cache holds of the rows at hand; a GPU takes all of them at once.
CACHED_BYTES = 2**20
TOP = 5


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Compute the cross-entropy of each row.

    Args:
        logits: (n, V), any float type; computed in float32 (float64 stays).
        targets: (n,), the right tokens.
        label_smoothing: Share of the target that is spread over the vocabulary. Default 0.

    Returns:
        (n,), in nats; it carries gradients to the logits, once.
    """
    losses: torch.Tensor = _CrossEntropies.apply(logits, targets, label_smoothing)
    return losses


def losses_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of each row, and whether its right token is the best, or one of the best five.

    The right token is one of the best five where fewer than five logits are greater than its own. It is the best where
    none is, and of several equal ones where it is the first, as for `argmax`. No gradients.

    Args:
        logits: (n, V), any float type; computed in float32 (float64 stays).
        targets: (n,), the right tokens.

    Returns:
        Losses in nats, (n,); hits and hits among the best five, (n,) bool. A row with a nan has no hit.
    """
    hits = torch.empty_like(targets, dtype=torch.bool)
    top_hits = torch.empty_like(hits)
    losses = targets.new_empty(len(targets), dtype=_precision(logits))
    room = None
    for rows in _slices(logits):
        some, right = logits[rows].to(losses.dtype), targets[rows]
        room = torch.empty_like(some) if room is None else room
        losses[rows] = -_log_probabilities(some, right)
        own = some.gather(1, right[:, None])
        greater = some.shape[-1] - _count(torch.le, some, own, room)
        number = ~losses[rows].isnan()
        best = (greater == 0) & number
        hits[rows], top_hits[rows] = best, (greater < TOP) & number
        if best.any():
            tied = best & (some.shape[-1] - _count(torch.lt, some, own, room) > 1)
            if tied.any():
                hits[rows] = torch.where(tied, some.argmax(dim=-1) == right, best)
    return losses, hits, top_hits


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        losses = targets.new_empty(len(targets), dtype=_precision(logits))
        sums = torch.empty_like(losses)
        for rows in _slices(logits):
            some, right = logits[rows].to(losses.dtype), targets[rows]
            log_probabilities = _log_probabilities(some, right)
            sums[rows] = some.gather(1, right[:, None])[:, 0] - log_probabilities
            losses[rows] = -log_probabilities
            if smoothing:
                spread = sums[rows] - some.mean(dim=-1)
                losses[rows] = (1 - smoothing) * losses[rows] + smoothing * spread
        ctx.save_for_backward(logits, targets, sums)
        ctx.smoothing = smoothing
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        logits, targets, sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _slices(logits):
            some = torch.sub(logits[rows].to(sums.dtype), sums[rows, None]).exp_()
            if ctx.smoothing:
                some.sub_(ctx.smoothing / some.shape[-1])
            some.scatter_add_(1, targets[rows, None], some.new_full((len(some), 1), ctx.smoothing - 1))
            result[rows] = some.mul_(gradient[rows, None])
        return result, None, None


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _count(
    compare: Callable[..., torch.Tensor], some: torch.Tensor, own: torch.Tensor, room: torch.Tensor
) -> torch.Tensor:
    """Count for each row how many numbers compare with its own; several times faster in floats than in truth values.

    Room for the floats is taken once: to get pages of memory from the system for every few rows costs as much again.
    """
    return compare(some, own, out=room[: len(some)]).sum(dim=-1)


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    count, vocabulary = logits.shape
    size = (
        max(1, CACHED_BYTES // (vocabulary * logits.element_size())) if logits.device.type == "cpu" else max(1, count)
    )
    for start in range(0, count, size):
        yield slice(start, start + size)
