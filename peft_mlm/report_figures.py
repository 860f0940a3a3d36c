"""The records of runs -> the curves and bars of a report, each told in words too; drawn elsewhere (`plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft_mlm.console import cell
from peft_mlm.plots import Bars, Curve
from peft_mlm.report_content import class_text, half_interval, length_classes, score_text, splits_of
from peft_mlm.run_record import figure, number, table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of curve.

    Attributes:
        name: Of the values in a log; names the picture too.
        title: What people call it.
        unit: Of the values.
        evaluated: Whether evaluations and the base have such values.
        scale: What the values are multiplied by.
    """

    name: str
    title: str
    unit: str = ""
    evaluated: bool = False
    scale: float = 1.0


KINDS = (
    Kind("loss", "Loss", "nats per masked token", evaluated=True),
    Kind("accuracy", "Masked accuracy", evaluated=True),
    Kind("learning_rate", "Learning rate"),
    Kind("grad_norm", "Gradient norm", "before it is clipped"),
    Kind("tokens_per_second", "Speed", "tokens per second"),
    Kind("peak_memory_bytes", "Peak memory", "GB", scale=1e-9),
    Kind("rank_total", "Ranks left", "over all layers"),
    Kind("active_subspaces", "Subspaces left", "over all layers"),
)


@dataclass(frozen=True)
class Key:
    """What a line of a picture is.

    Attributes:
        look: "line", "points", "level" (dotted, across) or "bars".
        series: Its colour; None for the colour of text.
        text: What it shows.
    """

    look: Literal["line", "points", "level", "bars"]
    series: int | None
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: Letters, digits and dashes; unique in the report.
        title: What it shows, with the unit.
        words: The same in words.
        keys: What its lines are; empty where the names of the runs say it.
        curves: Values over steps; or
        bars: how many texts have how many tokens.
        levels: Series and height of lines across.
        limit: Tokens that fit a row.
    """

    name: str
    title: str
    words: str
    keys: tuple[Key, ...]
    curves: tuple[Curve, ...] = ()
    bars: tuple[Bars, ...] = ()
    levels: tuple[tuple[int | None, float], ...] = ()
    limit: float | None = None


def curve_figures(runs: Sequence[Record]) -> list[Figure]:
    """Make a picture of each kind of value that a run has, the runs on top of each other.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The pictures, in the order of `KINDS`.
    """
    found = (_curves(kind, runs) for kind in KINDS)
    return [figure for figure in found if figure is not None]


def length_figures(runs: Sequence[Record]) -> list[Figure]:
    """Make a picture of the lengths of the texts, for each text once.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        One picture for each split of each text.
    """
    figures: list[Figure] = []
    seen: list[Any] = []
    for place, run in enumerate(runs):
        for number_of_split, (split, facts) in enumerate(splits_of(run)):
            classes = length_classes(facts)
            if classes and (split, facts.get("fingerprint"), classes) not in seen:
                seen.append((split, facts.get("fingerprint"), classes))
                figures.append(_lengths(f"lengths-{place}-{number_of_split}", split, facts, classes))
    return figures


def _curves(kind: Kind, runs: Sequence[Record]) -> Figure | None:
    curves: list[Curve] = []
    levels: list[tuple[int | None, float]] = []
    words: list[str] = []
    several = len(runs) > 1
    for place, run in enumerate(runs):
        told = []
        steps, values = _series(run["logs"], kind)
        if steps:
            behind = several and kind.evaluated
            curves.append(Curve(place, steps, values, dashed=several and not behind, faint=behind))
            told.append(f"{'training ' if kind.evaluated else ''}{_from_to(steps, values)}")
        if kind.evaluated:
            base = figure(run, "summary", "base", kind.name)
            held_out, points = _held_out(run, kind, place if several else 1, base, dashed=several)
            curves += held_out
            told += points
            if base is not None:
                levels.append((place, base))
                told.append(f"base {score_text(kind.name, base)}")
        words += [f"{run['name']}: {'; '.join(told)}"] if told else []
    if not curves:
        return None
    if len({height for _, height in levels}) == 1:  # one base of all
        levels = [(None, levels[0][1])]
    title = kind.title + (f" ({kind.unit})" if kind.unit else "")
    keys = _keys(curves, levels, several=several, evaluated=kind.evaluated)
    return Figure(kind.name.replace("_", "-"), title, f"{title} over steps. {'. '.join(words)}.", keys,
                  tuple(curves), levels=tuple(levels))  # fmt: skip


def _series(records: Sequence[Record], kind: Kind) -> tuple[list[float], list[float | None]]:
    """Pick one value of each log; a log without it is left out."""
    picked = [(record["step"], record[kind.name] * kind.scale) for record in records if kind.name in record]
    return [step for step, _ in picked], [value for _, value in picked]


def _held_out(
    run: Record, kind: Kind, series: int, base: float | None, *, dashed: bool
) -> tuple[list[Curve], list[str]]:
    """Make the curve of the evaluations, which starts at the base, and say it."""
    records = [record for record in run["evaluations"] if kind.name in record]
    if base is not None and all(record["step"] for record in records):
        records = [{**table(run["summary"], "base"), "step": 0}, *records]
    if not records or (len(records) == 1 and records[0]["step"] == 0):
        return [], []
    steps, values = _series(records, kind)
    errors = [half_interval(number(record.get(f"{kind.name}_standard_error"))) for record in records]
    return [Curve(series, steps, values, marked=True, errors=errors, dashed=dashed)], [
        f"held-out text {_from_to(steps, values)}"
    ]


def _from_to(steps: Sequence[float], values: Sequence[float | None]) -> str:
    if len(steps) == 1:
        return f"{cell(values[0])} at step {cell(steps[0])}"
    return f"{cell(values[0])} at step {cell(steps[0])} to {cell(values[-1])} at step {cell(steps[-1])}"


def _keys(
    curves: Sequence[Curve], levels: Sequence[tuple[int | None, float]], *, several: bool, evaluated: bool
) -> tuple[Key, ...]:
    if not evaluated:
        return ()
    marked = [curve for curve in curves if curve.marked]
    lines = [curve for curve in curves if not curve.marked]
    with_errors = any(error is not None for curve in marked for error in curve.errors or ())
    keys = [Key("line", None if several else lines[0].series, "training")] if lines else []
    if marked:
        text = "held-out text" + (", 95 % intervals" if with_errors else "")
        keys.append(Key("points", None if several else marked[0].series, text))
    return (*keys, *([Key("level", None, "base")] if levels else []))


def _lengths(name: str, split: str, facts: Record, classes: Sequence[tuple[int, int, int]]) -> Figure:
    total = sum(count for _, _, count in classes)
    edges = [low for low, _, _ in classes] + [classes[-1][1]]
    shares = [count / total for _, _, count in classes]
    limit = figure(facts, "max_seq_length")
    told = (f"{class_text(low, high)} tokens: {count / total:.1%}" for low, high, count in classes)
    shown = limit is not None and edges[0] < limit < edges[-1]
    keys = (Key("level", None, f"row of {cell(limit)} tokens"),) if shown else ()
    title = f"Lengths of the texts, {split}"
    bars = Bars(0 if split == "train" else 1, edges, shares)
    return Figure(name, title, f"{title}. {', '.join(told)}.", keys, bars=(bars,), limit=limit if shown else None)
