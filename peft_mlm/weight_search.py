"""Weights found by trying: a pattern search that is the same at each run and never ends above where it began.

Hooke and Jeeves 1961, https://doi.org/10.1145/321062.321069: from the best point so far, a step up and down along each
coordinate and along all of them together; where none is better, the step is halved. No gradient is needed, so that any
way of combining and any figure can be searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[float, ...]
FIRST_STEP, LAST_STEP = 0.25, 0.02
# A step must better the loss by this share to count: below it lies the rounding of float32 sums.
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Attributes:
        best: The point of the lowest loss.
        tried: Loss by point, in the order in which they were tried.
        finished: Whether no step of `LAST_STEP` is better; else the number of evaluations was used up.
    """

    best: Point
    tried: dict[Point, float]
    finished: bool


def search_weights(
    loss: Callable[[Point], float], starts: Sequence[Point], *, evaluations: int, lowest: float | None = None
) -> Search:
    """Search for the weights of the lowest loss.

    Args:
        loss: Computes the loss of weights.
        starts: Points that are tried first; the search goes on from the best of them.
        evaluations: How often the loss may be computed, the starts included.
        lowest: Weights below it are not tried; nor is the point where all weights are zero.

    Returns:
        The best weights and all that were tried.
    """
    tried: dict[Point, float] = {}

    def better(point: Point, than: Point) -> bool:
        if not allowed(point) or (point not in tried and len(tried) >= evaluations):
            return False
        if point not in tried:
            tried[point] = loss(point)
        return tried[point] < tried[than] * (1 - LEAST_GAIN)

    def allowed(point: Point) -> bool:
        return any(point) and (lowest is None or min(point) >= lowest)

    for start in starts:
        tried.setdefault(start, loss(start))
    best, step = min(tried, key=lambda point: tried[point]), FIRST_STEP
    count = len(best)
    single = [tuple(float(i == place) for i in range(count)) for place in range(count)]
    directions = [*single, (1.0,) * count] if count > 1 else single
    while step >= LAST_STEP and len(tried) < evaluations:
        moved = False
        for direction in directions:
            for sign in (1.0, -1.0):
                point = _move(best, direction, sign * step)
                while better(point, best):  # a direction that helps is followed
                    best, moved = point, True
                    point = _move(best, direction, sign * step)
        step = step if moved else step / 2
    return Search(best, tried, finished=step < LAST_STEP)


def _move(point: Point, direction: Point, step: float) -> Point:
    # rounded, so that a point reached on two ways is tried once
    return tuple(round(at + step * along, 6) for at, along in zip(point, direction, strict=True))
