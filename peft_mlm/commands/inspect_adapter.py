"""`peft-mlm inspect`: what an adapter, a model or a run is, from its files alone, in less than a second."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, bytes_text, cell, print_table
from peft_mlm.errors import ArgumentsError

LAYERS_SHOWN = 8


def inspect(path: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Describe an adapter, a model or a run. Nothing is loaded, and no pickle is opened.

    Args:
        path: A run folder, or the folder of an adapter, a model or a checkpoint.
        base: Folder of a base to hold the adapter against.

    Returns:
        What the files tell, as `peft-mlm inspect --json` prints it; `fit` is None without `base`.

    Raises:
        RunFolderError: There is neither adapter nor model.
        DamagedFileError: A file is not what its name says.
        ArgumentsError: A base is given for what is no adapter.
        ModelError: There is no base in that folder.
    """
    from peft_mlm.base_fit import check_fit
    from peft_mlm.inspection import inspect_shipped
    from peft_mlm.shipped import find_shipped

    shipped = find_shipped(path)
    if base is not None and shipped.kind != "adapter":
        raise ArgumentsError(f"{path} is a whole model, and needs no base. Leave --base out.")
    record = inspect_shipped(shipped)
    return {**record, "fit": None if base is None else check_fit(shipped, base)}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return inspect(given.path, base=given.base)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    from peft_mlm.inspection import largest_changes

    rows = [(name, _plain(value)) for name, value in _rows(record) if value not in (None, "", 0)]
    print_table(f"{record['kind']} in {record['path']}", None, rows, stream=sys.stdout)
    changes = largest_changes(record, LAYERS_SHOWN)
    if changes:
        inside = _common_part([layer["name"] for layer in changes])
        shown = [
            (_plain(layer["name"].removeprefix(inside)), layer["rank"], layer["scaling"], layer["delta_norm"])
            for layer in changes
        ]
        left = len(record["layers"]) - len(changes)
        title = "largest changes" + (f" in {_plain(inside[:-1])}" if inside else "")
        title += f" ({left} more layers with --json)" if left else ""
        print_table(title, ("layer", "rank", "scaling", "norm of the change"), shown, stream=sys.stdout)
    for warning in record["warnings"]:
        print(f"  warning: {_plain(warning)}")
    if record["fit"] is not None:
        _show_fit(record["fit"])


def help_text() -> str:
    """Give the text of `peft-mlm inspect --help`."""
    return _parser().format_help()


def _rows(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [("what", record["title"] or record["method"])]
    rows += _adapter_rows(record) if record["kind"] == "adapter" else _model_rows(record)
    types = ", ".join(f"{kind}: {count:,}" for kind, count in record["dtypes"].items())
    rows += [
        ("parameters", f"{record['parameters']:,} in {record['tensors']} tensors ({types})"),
        ("weights, folder", f"{bytes_text(record['weight_bytes'])}, {bytes_text(record['folder_bytes'])}"),
    ]
    return [*rows, *_training_rows(record["training"] or {}), ("licence", record["licence"] or "not told")]


def _adapter_rows(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    base = record["base"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    recipe = ", ".join(f"{name} {value}" for name, value in base["recipe"].items())
    known = f"{base['fingerprint_tensors']} tensors" if base["fingerprint_tensors"] else "none"
    masking = base["masking"] or {}
    return [
        ("rank, alpha, scaling", ", ".join(_several(record[name]) for name in ("rank", "alpha", "scaling"))),
        ("layers", record["target_layers"] and f"{record['target_layers']}: " + ", ".join(
            f"{name} ({count})" for name, count in record["targets"].items())),
        ("trained in full", ", ".join(record["trained_modules"])),
        ("new tokens", record["new_tokens"]),
        ("base", f"{base['name'] or 'not named'}{revision} ({base['architecture'] or 'unknown'})"),
        ("fingerprint of the base", known),
        ("base prepared with", recipe),
        ("tokenizer", base["tokenizer"] and f"{base['tokenizer'].get('size')} tokens, "
                                            f"{str(base['tokenizer'].get('vocabulary'))[:12]}"),
        ("masking", ", ".join(f"{name} {value}" for name, value in masking.items())),
    ]  # fmt: skip


def _model_rows(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    merge = record["merge"] or {}
    return [
        ("architecture", record["architecture"]),
        ("vocabulary", record["vocab_size"]),
        ("difference from base + adapter", merge.get("max_abs_logit_diff")),
    ]


def _training_rows(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [("run", training.get("status")), ("steps", training.get("steps") or training.get("step"))]
    for name, part in (("base", "base"), ("adapted", "adapted")):
        scores = training.get(part)
        if isinstance(scores, dict):
            figures = f"perplexity {cell(scores.get('perplexity'))}, masked accuracy {cell(scores.get('accuracy'))}"
            rows.append((f"held-out text, {name}", figures))
    return rows


def _show_fit(fit: Mapping[str, Any]) -> None:
    told = {True: "fits", False: "does not fit", None: "cannot be told"}[fit["fits"]]
    print(f"  base {fit['base']}: {told} ({fit['compared']} layers, {fit['fingerprint']} tensors of the fingerprint)")
    for difference in fit["differences"]:
        print(f"    {_plain(difference)}")


def _common_part(names: Sequence[str]) -> str:
    """Give the parts with which all names begin, with the dots behind them; a layer keeps its last part."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _several(value: Any) -> str:
    if isinstance(value, list):
        return f"{cell(value[0])} to {cell(value[-1])}"
    return cell(value)


def _plain(value: Any) -> Any:
    """Show no letters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else value


def _parser() -> CommandParser:
    parser = CommandParser("inspect", __doc__)
    parser.add_argument("path", help="run folder, or the folder of an adapter, a model or a checkpoint")
    parser.add_argument("--base", help="folder of a base to hold the adapter against")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
