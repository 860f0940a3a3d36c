"""What a report is made of (tiles, tables, sections), and how its figures, intervals and times are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import NormalDist, median
from typing import Any

from peft_mlm.console import cell, few_names
from peft_mlm.methods import METHODS
from peft_mlm.run_record import figure, table

LEVEL = 0.95
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first.

    Attributes:
        label: What it is.
        value: The figure.
        remark: What belongs to it, in small letters.
    """

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which names the row.

    Attributes:
        title: What it shows.
        header: Names of the columns; empty for a list of names and values.
        rows: Cells, all of them texts.
        folded: Whether it is shown only when asked for.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading.
        texts: Sentences.
        tables: Tables.
        codes: Commands, each with what stands above it.
        place: "curves" or "lengths", where pictures belong; else empty.
    """

    title: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    codes: tuple[tuple[str, str], ...] = ()
    place: str = ""


def half_interval(standard_error: float | int | None) -> float | None:
    """Half of the interval around a figure: 1.96 standard errors.

    Args:
        standard_error: Of the figure, or None.

    Returns:
        What to add and to subtract, or None where there is no standard error.
    """
    return None if standard_error is None else NormalDist().inv_cdf(0.5 + LEVEL / 2) * standard_error


def score_text(name: str, value: float | int) -> str:
    """Write a figure of an evaluation.

    Args:
        name: "loss", "perplexity", "accuracy" and the like.
        value: The figure.

    Returns:
        Four digits of a perplexity, all of those before the point; four decimals of the others.
    """
    if name != "perplexity":
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:#.4g}"


def interval(scores: Record, name: str) -> str:
    """Write the 95 % interval of a figure of an evaluation.

    Args:
        scores: The evaluation.
        name: "loss", "perplexity" (that of the loss, exponentiated), "accuracy" or another with a standard error.

    Returns:
        Such as "1.68 to 1.82"; empty where there is no standard error.
    """
    of = "loss" if name == "perplexity" else name
    value, half = figure(scores, of), half_interval(figure(scores, f"{of}_standard_error"))
    if value is None or half is None:
        return ""
    low, high = value - half, value + half
    if name == "perplexity":
        low, high = power(low), power(high)
    elif of != "loss":
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{score_text(name, low)} to {score_text(name, high)}"


def with_interval(scores: Record, name: str) -> str:
    """Write a figure of an evaluation with its 95 % interval.

    Args:
        scores: The evaluation.
        name: As in `interval`.

    Returns:
        Such as "1.745 (1.68 to 1.82)"; empty where there is no such figure.
    """
    value, around = figure(scores, name), interval(scores, name)
    return "" if value is None else score_text(name, value) + (f" ({around})" if around else "")


def power(value: float) -> float:
    """Give exp(value); inf where that is beyond a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def signed(value: float | int | None) -> str:
    """Write a difference of losses or accuracies with its sign; empty for None."""
    return "" if value is None else f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def date_text(moment: Any) -> str:
    """Write a moment to the minute.

    Args:
        moment: As ISO 8601, in UTC.

    Returns:
        Such as "2026-11-28 08:12 UTC"; empty for what is no moment.
    """
    try:
        return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError, OverflowError):
        return ""


def seconds_text(seconds: float | int | None) -> str:
    """Say a time as people do.

    Args:
        seconds: The time, or None.

    Returns:
        Such as 96.9 s, 12 min 5 s or 3 h 20 min; empty for None.
    """
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.3g} s" if seconds < 100 else f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def value_text(value: Any) -> str:
    """Write the value of an argument or a fact in a cell.

    Args:
        value: Text, number, truth value, list, table or None.

    Returns:
        Its text; empty for None.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(value_text(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return cell(value)


def argument_text(value: Any) -> str:
    """Write the value of an argument as a config would: true and false, all digits.

    Args:
        value: Text, number, truth value, list, table or None.

    Returns:
        Its text; empty for None.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(argument_text(part) for part in value)
    return "" if value is None else json.dumps(value) if isinstance(value, Mapping) else str(value)


def adapter_of(run: Record) -> Record:
    """Tell what adapter a run trains, also where it has not saved it yet.

    Args:
        run: From `run_record.read_run`.

    Returns:
        The run's `adapter`; else `title`, and for LoRA `rank` and `alpha`, by its arguments; empty where the whole
        model is trained.
    """
    method = str(run["summary"].get("method"))
    if run["adapter"] is not None or method not in METHODS:
        return run["adapter"] or {}
    asked = {"rank": "lora_r", "alpha": "lora_alpha"} if method == "lora" else {}
    return {"title": METHODS[method].title, **{name: run["arguments"].get(option) for name, option in asked.items()}}


def side_by_side(names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Put facts of several runs into rows; a row that is empty in all of them is left out.

    Args:
        names: The facts, in order.
        columns: For each run, texts by fact.

    Returns:
        Rows: the fact, and its text for each run.
    """
    rows = ((name, *(column.get(name, "") for column in columns)) for name in names)
    return tuple(row for row in rows if any(row[1:]))


def source_name(facts: Record) -> str:
    """Name where a split's texts come from.

    Args:
        facts: About the split, as in dataset.json.

    Returns:
        Names of files, or of a data set; empty where it is not told.
    """
    source = table(facts, "source")
    files = source.get("files")
    if isinstance(files, list):
        return few_names([str(file) for file in files])
    name = " ".join(str(source[key]) for key in ("dataset", "config") if source.get(key))
    return f"{name}, split {source['split']}" if source.get("split") else name


def length_classes(facts: Record) -> list[tuple[int, int, int]]:
    """Read how many texts have how many tokens.

    Args:
        facts: About a split, as in dataset.json.

    Returns:
        For each class its shortest length, the first length beyond it, and its number of texts; empty where this is not
        told, or there is no text.
    """
    lengths = table(facts, "text_lengths")
    edges, counts = (_whole_numbers(lengths.get(name)) for name in ("edges", "counts"))
    if len(edges) != len(counts) + 1 or sum(counts) == 0:
        return []
    return [(low, high, count) for (low, high), count in zip(pairwise(edges), counts, strict=True)]


def class_text(low: int, high: int) -> str:
    """Write a class of lengths, from `low` to below `high`."""
    return cell(low) if high - low == 1 else f"{cell(low)} to {cell(high - 1)}"


def median_speed(run: Record) -> str:
    """Write the median of the speeds that a run logged.

    Args:
        run: From `run_record.read_run`.

    Returns:
        Tokens per second; empty where none was logged.
    """
    speeds = [log["tokens_per_second"] for log in run["logs"] if "tokens_per_second" in log]
    return f"{median(speeds):,.0f}" if speeds else ""


def splits_of(run: Record) -> list[tuple[str, Record]]:
    """Give the facts about each split of a run's text.

    Args:
        run: From `run_record.read_run`.

    Returns:
        Names and facts.
    """
    return [(split, facts) for split, facts in run["data"].items() if isinstance(facts, Mapping)]


def _whole_numbers(values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int)] if isinstance(values, list) else []
