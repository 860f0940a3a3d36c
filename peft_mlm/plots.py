"""Curves and bars as SVG that stands inside a page: it takes colours from the page, and is the same each time.

matplotlib draws. Its colours are stand-ins, in whose place the page's CSS variables are put, so that one picture serves
light and dark; its names are made unique in the page; nothing in it points outside.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from peft_mlm.errors import ArgumentsError

# Runs are told apart by colour, dash and mark together; the page has this many colours (`--series-0` and on).
COLOURS = 6
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (8, 2, 2, 2)))
SVG_DASHES = ("", "6 2", "2 1.5", "8 2 2 2")
MARKS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#010101", "#020202"
WIDTH, HEIGHT = 4.8, 2.8  # inches; 72 units of the picture each
MOST_POINTS = 400
MISSING = (
    "An HTML report needs matplotlib for its curves, which is not installed. Install it: pip install "
    "'peft-mlm[report]'. Or write Markdown, which needs none: --output_file report.md."
)
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Curve:
    """Values over steps.

    Attributes:
        series: Which colour and mark it has.
        steps: Where the values stand.
        values: As many; None leaves a gap.
        marked: Whether each value is a point of its own (an evaluation), not one of a dense line.
        errors: Half of the interval of each value, or None where there is none.
        dashed: Whether it has the dashes of its series too, which tell runs apart without colour.
        faint: Whether it stands behind the others.
    """

    series: int
    steps: Sequence[float]
    values: Sequence[float | None]
    marked: bool = False
    errors: Sequence[float | None] | None = None
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Bars:
    """How many texts have how many tokens, in classes.

    Attributes:
        series: Which colour they have.
        edges: Of n classes, n + 1 lengths.
        shares: Of n classes, the share of the texts.
    """

    series: int
    edges: Sequence[float]
    shares: Sequence[float]


def check_drawing() -> None:
    """Check that pictures can be drawn.

    Raises:
        ArgumentsError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentsError(MISSING) from error


def draw_curves(name: str, curves: Sequence[Curve], levels: Sequence[tuple[int | None, float]] = ()) -> str:
    """Draw values over steps.

    Args:
        name: Makes the names inside the picture unique in its page: letters, digits and dashes.
        curves: The values.
        levels: Series (None for one that belongs to all) and height of lines across.

    Returns:
        The element `svg`, without a size of its own but with its proportions.

    Raises:
        ArgumentsError: matplotlib is not installed.
    """
    with _axes() as (figure, axes):
        for series, height in levels:
            axes.axhline(height, color=INK if series is None else colour(series), linewidth=1.1, linestyle=(0, (1, 2)))
        for curve in curves:
            _draw_curve(axes, curve)
        axes.set_xlabel("step")
        axes.margins(x=0.03, y=0.08)
        return _render(name, figure)


def draw_bars(name: str, bars: Sequence[Bars], *, limit: float | None = None) -> str:
    """Draw how many texts have how many tokens; classes of different width get bars of one width.

    Args:
        name: As in `draw_curves`.
        bars: One set of bars, or several beside each other; classes of one set may differ from those of another only
            where each gets a picture of its own.
        limit: Tokens that fit a row; marked where they lie within the classes.

    Returns:
        As `draw_curves`.

    Raises:
        ArgumentsError: matplotlib is not installed.
    """
    with _axes() as (figure, axes):
        for one in bars:
            places = [place + 0.5 for place in range(len(one.shares))]
            axes.bar(places, [100 * share for share in one.shares], width=0.86, color=colour(one.series))
        edges = bars[0].edges
        if limit is not None and edges[0] < limit < edges[-1]:
            low = max(index for index, edge in enumerate(edges) if edge <= limit)
            place = low + (limit - edges[low]) / (edges[low + 1] - edges[low])
            axes.axvline(place, color=INK, linewidth=1.1, linestyle=(0, (1, 2)))
        axes.set_xlim(0, len(edges) - 1)
        # A class of one length has its name below it, another one its ends.
        single = all(high - low == 1 for low, high in pairwise(edges))
        labels = [short_number(edge) for edge in (edges[:-1] if single else edges)]
        every = math.ceil(len(labels) / 7)
        axes.set_xticks([place + single / 2 for place in range(0, len(labels), every)], labels[::every])
        axes.set_xlabel("tokens of a text")
        axes.set_ylabel("% of the texts")
        axes.grid(axis="x", visible=False)
        return _render(name, figure)


def colour(series: int) -> str:
    """Give the stand-in for the colour of a series."""
    return f"#0a0a{series % COLOURS:02x}"


def short_number(value: float, _position: int | None = None) -> str:
    """Write a number at an axis: few letters, no sum of a base and an exponent.

    Args:
        value: The number.
        _position: Where the axis has it; of no matter.

    Returns:
        Such as 0.003, 1e-5, 12k or 3.5M.
    """
    for unit, smallest, size in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e4, 1e3)):
        if smallest <= abs(value) < 1e12:
            return f"{value / size:.4g}{unit}"
    text = f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].replace('+', '')}{found[2]}", text).replace("-", "−")


def thinned(steps: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Take averages of neighbours where there are more values than a picture can show.

    Args:
        steps: Where the values stand.
        values: As many; None for a gap.

    Returns:
        At most `MOST_POINTS` of both; the last step of each group.
    """
    group = math.ceil(len(values) / MOST_POINTS)
    if group <= 1:
        return list(steps), list(values)
    few: list[float | None] = []
    for start in range(0, len(values), group):
        known = [value for value in values[start : start + group] if value is not None]
        few.append(sum(known) / len(known) if known else None)
    return [steps[min(start + group, len(steps)) - 1] for start in range(0, len(steps), group)], few


def _draw_curve(axes: Any, curve: Curve) -> None:
    steps, values = (list(curve.steps), list(curve.values)) if curve.marked else thinned(curve.steps, curve.values)
    heights = [math.nan if value is None else value for value in values]
    look: dict[str, Any] = {
        "color": colour(curve.series),
        "linestyle": DASHES[curve.series % len(DASHES)] if curve.dashed else "-",
        "linewidth": 1.1 if curve.faint else 1.8,
        "alpha": 0.55 if curve.faint else 1,
    }
    if curve.marked or sum(value is not None for value in values) == 1:
        look |= {"marker": MARKS[curve.series % len(MARKS)], "markersize": 4.5}
    if curve.errors is None or all(error is None for error in curve.errors):
        axes.plot(steps, heights, **look)
    else:
        errors = [math.nan if error is None else error for error in curve.errors]
        axes.errorbar(steps, heights, yerr=errors, capsize=2.5, elinewidth=1.1, **look)


@contextmanager
def _axes() -> Iterator[tuple[Any, Any]]:
    """Make axes in our own style, whatever the user's matplotlibrc says."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise ArgumentsError(MISSING) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "svg.hashsalt": "peft-mlm", "font.size": 11,
                "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
                "axes.edgecolor": GRID, "grid.color": GRID, "grid.linewidth": 0.8, "axes.grid": True,
                "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
                "axes.spines.left": False, "ytick.left": False, "path.simplify": False,
            }
        )  # fmt: skip
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for axis, count in ((axes.xaxis, 6), (axes.yaxis, 5)):
            axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=axis is axes.xaxis))
            axis.set_major_formatter(FuncFormatter(short_number))
        yield figure, axes


def _render(name: str, figure: Any) -> str:
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The data about the picture, and a style that would hold for the whole page.
            if child.tag.endswith("}metadata") or child.tag == f"{_SVG}style":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _fit_into_page(element, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"aria-hidden": "true", "focusable": "false"}
    return ElementTree.tostring(root, encoding="unicode")


def _fit_into_page(element: ElementTree.Element, name: str) -> None:
    """Take colours and fonts from the page; make names unique in it."""
    element.text, element.tail = (None if text is not None and not text.strip() else text
                                  for text in (element.text, element.tail))  # fmt: skip
    link = element.attrib.pop(_XLINK, None)
    if link is not None:
        element.set("href", link.replace("#", f"#{name}-"))
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key in ("clip-path", "style"):
            value = value.replace("url(#", f"url(#{name}-")
            for stand_in, variable in ((INK, "ink-soft"), (GRID, "grid"), *((colour(i), f"series-{i}")
                                                                             for i in range(COLOURS))):  # fmt: skip
                value = value.replace(stand_in, f"var(--{variable})")
            value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
            element.set(key, re.sub(r"font-family: [^;]*; ?", "", value))
