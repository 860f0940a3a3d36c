"""Pictures are right, the same each time, and take what they look like from the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from peft_mlm.plots import COLOURS, MOST_POINTS, Bars, Curve, draw_bars, draw_curves, short_number, thinned

STEPS = [0, 10, 20, 40]
VALUES = [3.0, 2.5, 1.0, 1.25]


def points(path: str) -> np.ndarray:
    """The corners of a path."""
    return np.array([[float(number) for number in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])


def lines(picture: str, colour: str) -> list[np.ndarray]:
    """The paths that are drawn in a colour."""
    root = ElementTree.fromstring(picture)
    styled = [element for element in root.iter("path") if f"stroke: var(--{colour})" in element.get("style", "")]
    return [points(element.get("d", "")) for element in styled if "clip-path" in element.attrib]


def test_a_curve_goes_through_its_values() -> None:
    (drawn,) = lines(draw_curves("a", [Curve(2, STEPS, VALUES)]), "series-2")
    for places, values in ((drawn[:, 0], STEPS), (drawn[:, 1], VALUES)):
        slope, start = np.polyfit(values, places, 1)
        np.testing.assert_allclose(places, slope * np.array(values) + start, atol=1e-3)
        assert abs(slope) > 0.1
    assert drawn[0, 1] < drawn[-1, 1]  # more stands higher: places count from the top


def test_an_interval_is_as_long_as_twice_its_half() -> None:
    picture = draw_curves("a", [Curve(0, STEPS, VALUES, marked=True, errors=[0.5, None, 0.1, 0.2])])
    curve, *bars = sorted(lines(picture, "series-0"), key=len, reverse=True)
    scale = abs((curve[0, 1] - curve[2, 1]) / (VALUES[0] - VALUES[2]))
    lengths = sorted(abs(bar[0, 1] - bar[1, 1]) / scale for bar in bars if np.isfinite(bar).all() and len(bar) == 2)
    np.testing.assert_allclose(lengths, [0.2, 0.4, 1.0], atol=1e-3)


def test_a_gap_is_left_open() -> None:
    picture = draw_curves("a", [Curve(0, [1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0])])
    (path,) = re.findall(r'd="([^"]*)"[^>]*stroke: var\(--series-0\)', picture)
    assert path.count("M") == 2


def test_a_level_lies_across_at_its_height() -> None:
    picture = draw_curves("a", [Curve(0, STEPS, VALUES)], [(None, 2.5), (1, 1.0)])
    (curve,), (level,) = lines(picture, "series-0"), lines(picture, "series-1")
    assert level[0, 1] == level[1, 1] == pytest.approx(curve[2, 1], abs=1e-3)
    assert any(abs(line[0, 1] - curve[1, 1]) < 1e-3 for line in lines(picture, "ink-soft"))


def test_bars_are_as_high_as_their_shares() -> None:
    picture = draw_bars("a", [Bars(1, [0, 10, 20, 500], [0.5, 0.4, 0.1])], limit=15)
    paths = re.findall(r'd="([^"]*)"[^>]*fill: var\(--series-1\)', picture)
    heights = [np.ptp(points(path)[:, 1]) for path in paths]
    np.testing.assert_allclose(np.array(heights) / sum(heights), [0.5, 0.4, 0.1], atol=1e-4)
    places = [points(path)[:, 0].mean() for path in paths]
    (limit,) = [line for line in lines(picture, "ink-soft") if line[0, 0] == line[1, 0]]
    # 15 lies in the middle of the second class.
    assert limit[0, 0] == pytest.approx(np.mean([points(paths[1])[:, 0].min(), points(paths[1])[:, 0].max()]), abs=0.1)
    assert places == sorted(places)


def test_classes_are_named_at_their_ends_and_single_lengths_below_their_bars() -> None:
    def names(edges: list[float]) -> list[str]:
        picture = draw_bars("a", [Bars(0, edges, [1 / (len(edges) - 1)] * (len(edges) - 1))])
        return [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture) if text in {f"{e:g}" for e in edges}]

    assert names([100, 110, 120, 500]) == ["100", "110", "120", "500"]
    assert names([113, 114, 115, 116]) == ["113", "114", "115"]


@pytest.fixture(scope="module")
def picture() -> str:
    """A picture with everything in it."""
    curves = [Curve(n, STEPS, VALUES, marked=n % 2 == 0, errors=[0.1] * 4, dashed=True) for n in range(COLOURS + 1)]
    return draw_curves("one", curves, [(None, 2.0)])


def test_a_picture_brings_no_colour_font_or_address_of_its_own(picture: str) -> None:
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'(url\(|href=")#[^")]*', "", picture))
    assert "font-family" not in picture
    assert "://" not in picture
    assert {f"var(--series-{n})" for n in range(COLOURS)} <= set(re.findall(r"var\([^)]*\)", picture))


def test_two_pictures_share_no_name_and_find_their_own_parts(picture: str) -> None:
    other = draw_curves("two", [Curve(0, STEPS, VALUES)])
    names = [set(re.findall(r' id="([^"]*)"', text)) for text in (picture, other)]
    assert not names[0] & names[1]
    for text, there in zip((picture, other), names, strict=True):
        used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
        assert used
        assert used <= there


def test_the_same_values_give_the_same_picture_whatever_the_settings_of_the_user_say(tmp_path: Path) -> None:
    program = """
from peft_mlm.plots import Curve, draw_curves
print(draw_curves("a", [Curve(0, [1, 2], [1.0, 2.0], marked=True)]))
"""
    drawn = []
    for settings in ("", "lines.linewidth: 7\naxes.facecolor: red\nfont.size: 30\n"):
        folder = tmp_path / str(len(settings))
        folder.mkdir()
        (folder / "matplotlibrc").write_text(settings)
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
        drawn.append(done.stdout)
    assert drawn[0] == drawn[1] != ""


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS - 3])
def test_many_values_become_few_averages(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    steps, few = thinned(list(range(count)), values.tolist())
    assert len(steps) == len(few) <= MOST_POINTS
    assert steps[-1] == count - 1
    group = -(-count // MOST_POINTS)
    np.testing.assert_allclose(few, [values[i : i + group].mean() for i in range(0, count, group)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.003, "0.003"), (1e-5, "1e−5"), (-0.5, "−0.5"),
        (1000, "1000"), (12000, "12k"), (3.5e6, "3.5M"), (2e20, "2e20"),
    ],
)  # fmt: skip
def test_numbers_at_axes_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
