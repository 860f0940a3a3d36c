"""Spearman's rank correlation, with ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation of two lists of numbers.

    Attributes:
        rho: From -1 to 1; nan for fewer than two pairs, or where all numbers of one list are equal.
        pairs: How many pairs it is made of.
        tied: How many of these share the first number with another pair, and how many the second.
    """

    rho: float
    pairs: int
    tied: tuple[int, int]


def spearman(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    """Compute Spearman's rank correlation: Pearson's correlation of the ranks, equal numbers sharing their mean rank.

    Args:
        first: Numbers.
        second: As many numbers; pairs in which either is nan are left out.

    Returns:
        The correlation.
    """
    pairs = np.array([first, second], np.float64)
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    ranked = [ranks(numbers) for numbers in pairs]
    tied = [int(_sizes_of_ties(numbers).sum()) for numbers in pairs]
    count = pairs.shape[1]
    one, other = (numbers - (count + 1) / 2 for numbers in ranked)
    spread = math.sqrt(float(one @ one) * float(other @ other)) if count else 0.0
    rho = float(one @ other) / spread if spread > 0 else math.nan
    return RankCorrelation(max(-1.0, min(1.0, rho)) if not math.isnan(rho) else rho, count, (tied[0], tied[1]))


def ranks(numbers: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rank numbers from the smallest.

    Example:
        >>> ranks([7.0, 3.0, 7.0]).tolist()
        [2.5, 1.0, 2.5]

    Args:
        numbers: (n,), no nan.

    Returns:
        Ranks from 1, (n,); equal numbers share the mean of theirs.
    """
    values, places, sizes = np.unique(np.asarray(numbers, np.float64), return_inverse=True, return_counts=True)
    if not len(values):
        return np.empty(0)
    last = np.cumsum(sizes)
    means: npt.NDArray[np.float64] = (2 * last - sizes + 1) / 2
    return means[places]


def _sizes_of_ties(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    sizes = np.unique(numbers, return_counts=True)[1]
    return sizes[sizes > 1]
