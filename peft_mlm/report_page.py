"""A report -> one HTML page that needs no other file and no network, or Markdown.

Whatever a run's files say is text here: names from them are escaped, and the page allows neither scripts nor anything
from outside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_mlm.plots import COLOURS, MARKS, SVG_DASHES, draw_bars, draw_curves
from peft_mlm.report_content import Section, Table, Tile
from peft_mlm.report_facts import (
    all_arguments,
    environment_facts,
    logged_values,
    memory_facts,
    run_again,
    text_facts,
    what_was_adapted,
)
from peft_mlm.report_figures import Figure, curve_figures, length_figures
from peft_mlm.report_results import differences, lead, results, tiles
from peft_mlm.run_record import table

ASSETS = Path(__file__).resolve().parent / "report_assets"
# Marks a report as ours, with the SHA-256 of the rest: only what nobody has changed is replaced.
MARK = re.compile(r"peft-mlm-report ([0-9a-f]{64})")
_UNSET = "0" * 64


@dataclass(frozen=True)
class Report:
    """All that a report says, in order.

    Attributes:
        title: The name of the run, or how many there are.
        lead: What was done, a sentence for each run.
        tiles: The figures that are seen first.
        sections: The parts.
        names: Names of the runs, in the order of their colours.
        footer: What made it.
    """

    title: str
    lead: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    names: tuple[str, ...]
    footer: str


def build_report(runs: Sequence[Mapping[str, Any]]) -> Report:
    """Say what runs were and gave.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        What the report says.
    """
    several = len(runs) > 1
    sections = (
        results(runs),
        differences(runs) if several else None,
        logged_values(runs),
        what_was_adapted(runs),
        text_facts(runs),
        memory_facts(runs),
        run_again(runs),
        environment_facts(runs),
        all_arguments(runs),
    )
    versions = sorted({str(table(run["environment"], "versions").get("peft-mlm")) for run in runs} - {"None"})
    return Report(
        title=f"{len(runs)} runs side by side" if several else runs[0]["name"],
        lead=lead(runs),
        tiles=() if several else tiles(runs[0]),
        sections=tuple(section for section in map(_without_empty_tables, sections) if section is not None),
        names=tuple(run["name"] for run in runs),
        footer=f"Trained with peft-mlm {', '.join(versions)}." if versions else "Trained with peft-mlm.",
    )


def render_html(runs: Sequence[Mapping[str, Any]]) -> str:
    """Write the report of some runs as an HTML page; the same runs give the same page.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The page.

    Raises:
        ArgumentsError: matplotlib is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def breakable(text: str) -> Markup:
        """Let long names break behind their dots and dashes."""
        return Markup(re.sub(r"(?<=[^\W\d])([._/-]+)(?=\w)", r"\1<wbr>", str(escape(text))))

    environment.filters["breakable"] = breakable

    def draw(figure: Figure) -> Markup:
        return Markup(  # ours alone: no text of a run is in a picture
            draw_bars(figure.name, figure.bars, limit=figure.limit)
            if figure.bars
            else draw_curves(figure.name, figure.curves, figure.levels)
        )

    page = environment.get_template("report.html").render(
        report=build_report(runs),
        figures={"curves": curve_figures(runs), "lengths": length_figures(runs)},
        draw=draw,
        style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
        colours=COLOURS,
        dashes=SVG_DASHES,
        marks=MARKS,
        mark=f"peft-mlm-report {_UNSET}",
    )
    return _signed(page)


def render_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Write the report of some runs as Markdown: the same without pictures.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The text.
    """
    report = build_report(runs)
    lines = [f"<!-- peft-mlm-report {_UNSET} -->", "", f"# {_plain(report.title)}", ""]
    lines += [f"* {_plain(text)}" for text in report.lead] if len(report.lead) > 1 else [_plain(report.lead[0])]
    if report.tiles:
        rows = tuple((tile.label, tile.value, tile.remark) for tile in report.tiles)
        lines += ["", *_markdown_table(Table("", (), rows))]
    for section in report.sections:
        lines += ["", f"## {section.title}"]
        for text in section.texts:
            lines += ["", _plain(text)]
        for one in section.tables:
            title, shown = _plain(one.title), _markdown_table(one)
            if one.folded:
                lines += ["", f"<details><summary>{title}</summary>", "", *shown, "", "</details>"]
            else:
                lines += ["", f"### {title}", "", *shown]
        for name, code in section.codes:
            fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", code)), default=0))
            lines += ["", *([f"{_plain(name)}:", ""] if len(section.codes) > 1 else []), f"{fence}sh", code, fence]
    return _signed("\n".join([*lines, "", report.footer]) + "\n")


def is_untouched_report(text: str) -> bool:
    """Tell whether a text is a report as it was written here, and nobody has changed it since.

    Args:
        text: What a file holds.

    Returns:
        True if it may be replaced by a newer report.
    """
    found = MARK.search(text[:2000])
    return found is not None and found[1] == _digest(text[: found.start(1)] + _UNSET + text[found.end(1) :])


def _without_empty_tables(section: Section | None) -> Section | None:
    if section is None:
        return None
    tables = tuple(table for table in section.tables if table.rows)
    return replace(section, tables=tables) if tables or section.texts or section.codes else None


def _signed(text: str) -> str:
    return text.replace(_UNSET, _digest(text), 1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _markdown_table(shown: Table) -> list[str]:
    width = len(shown.header) if shown.header else max(len(row) for row in shown.rows)
    header = shown.header or ("",) * width
    lines = [header, ("---",) * width, *shown.rows]
    return [f"| {' | '.join(line if line == '---' else _plain(line) for line in cells)} |" for cells in lines]


def _plain(text: str) -> str:
    """Keep a text from being read as Markdown or HTML, on one line."""
    line = " ".join(text.split())
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(letter, entity)
    return re.sub(r"([\\`*\[\]|~#])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", line)
