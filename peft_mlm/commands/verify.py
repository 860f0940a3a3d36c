"""`peft-mlm verify`: whether what is shipped is whole and safe to open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, print_table
from peft_mlm.errors import DamagedFileError

FAULTS_SHOWN = 8


def verify(path: str | Path) -> dict[str, Any]:
    """Check checksums, the headers of safetensors, that all values are numbers, and the keys of the configurations.

    Nothing is loaded, and no pickle is opened.

    Args:
        path: A run folder, or the folder of an adapter, a model or a checkpoint.

    Returns:
        `path`, `kind` ("adapter" or "model"), `ok`, `faults` and `notices` (sentences), and how many were looked at:
        `checksums` (files), `tensors`, `values`.

    Raises:
        RunFolderError: There is neither adapter nor model.
    """
    from peft_mlm.shipped import find_shipped
    from peft_mlm.verification import verify_shipped

    shipped = find_shipped(path)
    return {"path": str(path), "kind": shipped.kind, **verify_shipped(shipped).describe()}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    record = verify(given.path)
    if not record["ok"]:
        shown, more = record["faults"][:FAULTS_SHOWN], len(record["faults"]) - FAULTS_SHOWN
        raise DamagedFileError(
            f"{given.path} is not sound: " + " ".join([*shown, *([f"And {more} more."] if more > 0 else [])])
        )
    return record


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        ["what", f"{record['kind']} in {record['path']}"],
        ["files equal to their checksums", record["checksums"]],
        ["tensors, all in their places", record["tensors"]],
        ["values, all finite", record["values"]],
        *([("notice", notice) for notice in record["notices"]]),
    ]
    print_table("verified", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm verify --help`."""
    return _parser().format_help()


def _parser() -> CommandParser:
    parser = CommandParser("verify", __doc__)
    parser.add_argument("path", help="run folder, or the folder of an adapter, a model or a checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
