"""Changes of weights made sparse, entry by entry, before they are summed: magnitude pruning, TIES, DARE.

TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708. DARE: Yu et al. 2024, https://arxiv.org/abs/2311.03099. The
functions take dense changes; what is summed is no longer of low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import xxhash

# A magnitude in float32 is ordered as the integer of its 31 bits; they are counted in two halves.
LOW_BITS, HIGH_BITS = 15, 16


def magnitude_threshold(tensors: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """Find the magnitude from which on entries belong to the largest ones of all tensors together.

    The tensors are made twice and never held together: the entries are counted by the upper half of their bits, then
    those in the decisive bin by the lower half.

    Args:
        tensors: Makes the tensors, of any shapes; the same ones at each call.
        density: Share of all entries to keep, above 0, at most 1.

    Returns:
        The smallest magnitude kept, a number of float32; 0 where there is nothing.
    """
    high = torch.zeros(1 << HIGH_BITS, dtype=torch.int64)
    for tensor in tensors():
        high += torch.bincount(_magnitude_bits(tensor) >> LOW_BITS, minlength=1 << HIGH_BITS)
    total = int(high.sum())
    if total == 0:
        return 0.0
    wanted = max(1, round(density * total))
    upper, above = _bin_from_top(high, wanted)
    low = torch.zeros(1 << LOW_BITS, dtype=torch.int64)
    for tensor in tensors():
        bits = _magnitude_bits(tensor)
        inside = bits[bits >> LOW_BITS == upper] & ((1 << LOW_BITS) - 1)
        low += torch.bincount(inside, minlength=1 << LOW_BITS)
    lower, _ = _bin_from_top(low, wanted - above)
    return float(torch.tensor(upper << LOW_BITS | lower, dtype=torch.int32).view(torch.float32))


def trim(change: torch.Tensor, threshold: float) -> torch.Tensor:
    """Set the entries below a magnitude to zero.

    Args:
        change: Any shape.
        threshold: From `magnitude_threshold`; compared in float32, as it was found.

    Returns:
        The same shape.
    """
    return torch.where(change.float().abs() >= threshold, change, 0.0)


def drop_and_rescale(change: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """Drop entries at random and scale the others up, so that the expected change stays as it is (DARE).

    Args:
        change: Any shape.
        density: Share of the entries that stay: 1 - p of the paper.
        seed: Any text; the same text drops the same entries.

    Returns:
        The same shape.
    """
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(seed.encode()) >> 1)
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return torch.where(kept, change / density, 0.0)


def disjoint_mean(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect a sign for each entry, and average the changes that have it (the last two steps of TIES).

    Args:
        changes: Of one shape; an entry of 0 takes no part.

    Returns:
        Entry by entry, with s the sign of the sum: the mean of the entries of sign s; 0 where the sum is 0.
    """
    stack = torch.stack(list(changes))
    agreeing = (stack.sign() == stack.sum(dim=0).sign()) & (stack != 0)
    return torch.where(agreeing, stack, 0.0).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def _magnitude_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().abs().flatten().contiguous().view(torch.int32)


def _bin_from_top(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """Give the highest bin at which `wanted` entries are reached, and how many lie above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top >= wanted).nonzero()[0])
    return len(counts) - 1 - place, int(from_top[place]) - int(counts[len(counts) - 1 - place])
