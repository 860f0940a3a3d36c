"""What `peft-mlm compare` found, as tables: for people, for Markdown, and as one flat table for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_mlm.console import cell, interval_text, with_error

Table = tuple[str, list[str], list[list[Any]]]
FIGURES = (
    "loss", "loss_standard_error", "perplexity", "accuracy", "accuracy_standard_error", "top5_accuracy",
    "masked_tokens",
)  # fmt: skip


def comparison_tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """Make the tables of a comparison.

    Args:
        record: From `peft_mlm.compare`.

    Yields:
        Title, header and rows: for each data set the figures, the differences from the reference, and the tokens that
        changed.
    """
    for one in record["data_sets"]:
        yield _figures(one)
        others = [model for model in one["models"] if model["against_reference"] is not None]
        if others:
            yield _differences(record["reference"], others)
        for model in others:
            if any(model["against_reference"]["tokens"].values()):
                yield _tokens(model)


def markdown_text(record: Mapping[str, Any]) -> str:
    """Write a comparison as Markdown.

    Args:
        record: From `peft_mlm.compare`.

    Returns:
        A heading and a table for each table.
    """
    lines = ["# Comparison", "", f"Reference: `{record['reference']}`."]
    for title, header, rows in comparison_tables(record):
        shown = [[_escaped(cell(value)) for value in row] for row in rows]
        ruler = ["---", *["---:"] * (len(header) - 1)]
        cells = [list(map(_escaped, header)), ruler, *shown]
        lines += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join(lines) + "\n"


def csv_text(record: Mapping[str, Any]) -> str:
    """Write a comparison as CSV: one line for each data set and model.

    Args:
        record: From `peft_mlm.compare`.

    Returns:
        The text, with a header; figures that are not known are empty.
    """
    changes = [f"{figure}_{name}" for figure in ("loss", "accuracy") for name in ("difference", "low", "high")]
    header = ["data_set", "model", "part", *FIGURES, *changes, "level", "win_rate_clusters", "win_rate_masked_tokens"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for one in record["data_sets"]:
        for model in one["models"]:
            against = model["against_reference"]
            row: list[Any] = [one["name"], model["model"], model["part"], *(model[name] for name in FIGURES)]
            if against is None:
                row += [None] * (len(header) - len(row))
            else:
                row += [against[f][name] for f in ("loss", "accuracy") for name in ("difference", "low", "high")]
                row += [record["bootstrap"]["level"], *against["win_rate"].values()]
            writer.writerow(row)
    return out.getvalue()


def _figures(one: Mapping[str, Any]) -> Table:
    rows = [
        [
            _shown(model),
            with_error(model["loss"], model["loss_standard_error"]),
            model["perplexity"],
            with_error(model["accuracy"], model["accuracy_standard_error"]),
            model["top5_accuracy"],
        ]
        for model in one["models"]
    ]
    draws = "" if one["mask_draws"] == 1 else f", masked {one['mask_draws']} times"
    title = (
        f"{one['name']}: {one['models'][0]['masked_tokens']:,} masked tokens in {one['rows']:,} rows{draws}; "
        f"{one['clusters']:,} clusters ({one['cluster']}s)"
    )
    return title, ["", "loss", "perplexity", "masked accuracy", "among the best 5"], rows


def _differences(reference: str, others: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for model in others:
        against = model["against_reference"]
        told = [interval_text(**against[name]) for name in ("loss", "accuracy")]
        wins = [f"{100 * share:.1f} %" for share in against["win_rate"].values()]
        rows.append([_shown(model), *told, *wins])
    header = ["", "loss", "masked accuracy", "better clusters", "better tokens"]
    return f"less {reference}", header, rows


def _tokens(model: Mapping[str, Any]) -> Table:
    tokens = model["against_reference"]["tokens"]
    rows = []
    for place in range(max(map(len, tokens.values()))):
        row: list[Any] = []
        for kind in ("gained", "lost"):
            token = tokens[kind][place] if place < len(tokens[kind]) else None
            row += ["", "", ""] if token is None else [token["token"], token["count"], f"{token['difference']:+.3f}"]
        rows.append(row)
    header = ["gained most", "times", "nats", "lost most", "times", "nats"]
    return f"tokens, {_shown(model)}", header, rows


def _shown(model: Mapping[str, Any]) -> str:
    return str(model["model"])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "\\<").replace("_", "\\_")
