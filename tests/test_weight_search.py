from __future__ import annotations

import pytest

from peft_mlm.weight_search import Point, search_weights


def test_it_finds_the_bottom_of_a_bowl_whose_axes_are_tilted() -> None:
    def loss(point: Point) -> float:
        x, y = point[0] - 0.6, point[1] - 0.3
        return 1 + x * x + y * y + 1.2 * x * y

    found = search_weights(loss, [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], evaluations=200)
    assert found.finished
    assert found.best == pytest.approx((0.6, 0.3), abs=0.05)
    assert found.tried[found.best] == min(found.tried.values())
    again = search_weights(loss, [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], evaluations=200)
    assert list(again.tried.items()) == list(found.tried.items())


def test_it_never_ends_above_a_start_and_keeps_to_its_number_of_evaluations() -> None:
    def loss(point: Point) -> float:
        return 5.0 if point != (0.25, 0.75) else 1.0

    starts = [(1.0, 0.0), (0.0, 1.0), (0.25, 0.75)]
    found = search_weights(loss, starts, evaluations=7)
    assert found.best == (0.25, 0.75)
    assert len(found.tried) == 7
    assert not found.finished


def test_weights_below_the_lowest_and_all_zero_are_not_tried() -> None:
    found = search_weights(lambda point: 1 + sum(point), [(1.0, 1.0)], evaluations=500, lowest=0.0)
    assert all(min(point) >= 0 and any(point) for point in found.tried)
    assert sum(found.best) == pytest.approx(0.0, abs=0.05)


def test_a_gain_below_rounding_is_none() -> None:
    found = search_weights(lambda point: 1 - 1e-9 * point[0], [(1.0,)], evaluations=50)
    assert found.best == (1.0,)
