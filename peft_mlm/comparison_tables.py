"""What `peft-mlm compare` found, as tables: for people, for Markdown, and as one flat table for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_mlm.console import cell, interval_text, with_error

# Title, header (None for a list of names and values), rows.
Table = tuple[str, list[str] | None, list[list[Any]]]
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
        names = short_names([model["model"] for model in one["models"]])
        yield _figures(names, one)
        for name, model in zip(names[1:], one["models"][1:], strict=True):
            yield _differences(name, names[0], model)
            if any(model["against_reference"]["tokens"].values()):
                yield _tokens(name, model)


def markdown_text(record: Mapping[str, Any]) -> str:
    """Write a comparison as Markdown.

    Args:
        record: From `peft_mlm.compare`.

    Returns:
        A heading and a table for each table.
    """
    models = [model["model"] for model in record["data_sets"][0]["models"]]
    lines = [
        "# Comparison",
        "",
        f"Reference: `{models[0]}`; against it: {', '.join(f'`{one}`' for one in models[1:])}.",
    ]
    for title, header, rows in comparison_tables(record):
        shown = [[_escaped(cell(value)) for value in row] for row in rows]
        ruler = ["---", "---"] if header is None else ["---", *["---:"] * (len(header) - 1)]
        cells = [list(map(_escaped, header or ["", ""])), ruler, *shown]
        lines += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join(lines) + "\n"


def csv_text(record: Mapping[str, Any]) -> str:
    """Write a comparison as CSV: one line for each data set and model.

    Args:
        record: From `peft_mlm.compare`.

    Returns:
        The text, with a header; figures that are not known are empty.
    """
    ends = ("difference", "difference_low", "difference_high")
    changes = [f"{figure}_{end}" for figure in ("loss", "accuracy") for end in ends]
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


def _figures(names: Sequence[str], one: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            with_error(model["loss"], model["loss_standard_error"]),
            model["perplexity"],
            with_error(model["accuracy"], model["accuracy_standard_error"]),
            model["top5_accuracy"],
        ]
        for name, model in zip(names, one["models"], strict=True)
    ]
    draws = "" if one["mask_draws"] == 1 else f", masked {one['mask_draws']} times"
    title = (
        f"{one['name']}: {one['models'][0]['masked_tokens']:,} masked tokens in {one['rows']:,} rows{draws}; "
        f"{one['clusters']:,} clusters ({one['cluster']}s)"
    )
    return title, ["", "loss", "perplexity", "masked accuracy", "top 5"], rows


def _differences(label: str, reference: str, model: Mapping[str, Any]) -> Table:
    against = model["against_reference"]
    shares = [f"{100 * share:.1f} %" for share in against["win_rate"].values()]
    rows = [
        ["loss", interval_text(**against["loss"])],
        ["masked accuracy", interval_text(**against["accuracy"])],
        ["lower loss on", f"{shares[0]} of the clusters, {shares[1]} of the masked tokens"],
    ]
    return f"{label} less {reference}", None, rows


def _tokens(label: str, model: Mapping[str, Any]) -> Table:
    tokens = model["against_reference"]["tokens"]
    rows = []
    for place in range(max(map(len, tokens.values()))):
        row: list[Any] = []
        for kind in ("gained", "lost"):
            token = tokens[kind][place] if place < len(tokens[kind]) else None
            row += ["", "", ""] if token is None else [token["token"], token["count"], f"{token['difference']:+.3f}"]
        rows.append(row)
    return f"tokens, {label}", ["gained most", "times", "nats", "lost most", "times", "nats"], rows


def short_names(words: Sequence[str]) -> list[str]:
    """Shorten paths to their ends, as far as they stay apart.

    Example:
        >>> short_names(["base", "runs/a/adapter", "runs/b/adapter", "runs/b/adapter"])
        ['base', 'a/adapter', 'b/adapter', 'b/adapter (2)']

    Args:
        words: Names and paths; the same one more than once is numbered.

    Returns:
        As many different names.
    """
    names: list[str] = []
    parts = [word.rstrip("/").split("/") for word in words]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(words)):
            break
    counted = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counted, strict=True)]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "\\<").replace("_", "\\_")
