"""How sure a figure is: standard errors and intervals of ratios of sums over clusters.

Masked tokens of one text are no independent draws; texts are, more or less. Each figure is a ratio R = sum y / sum x
over clusters (a row, or a document), y such as the sum of a cluster's losses and x its number of masked tokens.
Everything here needs these sums alone, so that memory does not grow with tokens. Clusters without a masked token tell
nothing and are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]

REPLICATES, LEVEL, SEED = 2000, 0.95, 0
# Numbers drawn at a time: memory does not grow with clusters times replicates.
_DRAWN_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A figure with its interval.

    Attributes:
        value: The figure itself.
        low: Lower end; nan for fewer than two clusters.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def ratio_standard_error(sums: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Estimate the standard error of sum y / sum x, clusters being independent.

    With R = sum y / sum x over n clusters: SE^2 = n / (n - 1) * sum (y_i - R x_i)^2 / (sum x)^2, the linearised
    variance of a ratio (Cochran 1977, Sampling Techniques, 3rd edition, chapter 6; the clustered standard error of
    Miller 2024, https://arxiv.org/abs/2411.00640, with n / (n - 1) for small n).

    Args:
        sums: y, (n,).
        counts: x, (n,).

    Returns:
        The standard error; nan for fewer than two clusters.
    """
    y, x = _counted(sums, counts)
    if len(x) < 2:
        return math.nan
    residuals = y - y.sum() / x.sum() * x
    return float(math.sqrt(len(x) / (len(x) - 1) * (residuals**2).sum()) / x.sum())


def bootstrap_ratios(
    sums: npt.ArrayLike,
    counts: npt.ArrayLike,
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = SEED,
) -> list[Interval]:
    """Give ratios of sums with intervals by resampling clusters.

    n clusters are drawn n times with replacement, `replicates` times, the same draws for every ratio. The interval is
    the bias-corrected and accelerated one (BCa; Efron 1987, https://doi.org/10.1080/01621459.1987.10478410), with the
    acceleration from leaving out one cluster at a time.

    Args:
        sums: y of each ratio, (n, ratios).
        counts: x, (n,), the same for every ratio.
        replicates: How often clusters are drawn. Default 2000.
        level: Share of such intervals that hold the true value. Default 0.95.
        seed: Of the draws: the same seed and clusters give the same intervals. Default 0.

    Returns:
        For each ratio its value and interval; where nothing varies, an interval of no width.
    """
    y, x = _counted(sums, counts)
    if len(x) == 0:
        return [Interval(math.nan, math.nan, math.nan)] * np.asarray(sums).shape[1]
    values = y.sum(axis=0) / x.sum()
    if len(x) < 2:
        return [Interval(float(value), math.nan, math.nan) for value in values]
    drawn = _resampled(np.column_stack([y, x]), replicates, seed)
    ratios = drawn[:, :-1] / drawn[:, -1:]
    without = (y.sum(axis=0) - y) / (x.sum() - x)[:, None]
    return [_bca(float(value), ratios[:, place], without[:, place], level) for place, value in enumerate(values)]


def _counted(sums: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Sums, Sums]:
    """Leave out clusters without a masked token."""
    y, x = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    return y[x > 0], x[x > 0]


def _resampled(sums: Sums, replicates: int, seed: int) -> Sums:
    """Sum up the clusters of each resample, (replicates, columns)."""
    count = len(sums)
    chance = np.random.default_rng(seed)
    result = np.empty((replicates, sums.shape[1]))
    at_once = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, replicates, at_once):
        rows = min(at_once, replicates - start)
        drawn = chance.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        result[start : start + rows] = times @ sums
    return result


def _bca(value: float, ratios: Sums, without: Sums, level: float) -> Interval:
    if ratios.min() == ratios.max():
        return Interval(value, float(ratios[0]), float(ratios[0]))
    normal = NormalDist()
    # Half of those that are equal count as below, and never all or none: the correction stays finite.
    below = (np.count_nonzero(ratios < value) + np.count_nonzero(ratios <= value)) / 2
    bias = normal.inv_cdf(min(max(below, 0.5), len(ratios) - 0.5) / len(ratios))
    away = without.mean() - without
    spread = float((away**2).sum()) ** 1.5
    acceleration = float((away**3).sum()) / (6 * spread) if spread else 0.0

    def end(share: float) -> float:
        moved = bias + normal.inv_cdf(share)
        return float(np.quantile(ratios, normal.cdf(bias + moved / (1 - acceleration * moved))))

    tail = (1 - level) / 2
    return Interval(value, end(tail), end(1 - tail))
