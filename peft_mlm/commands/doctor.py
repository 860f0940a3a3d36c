"""`peft-mlm doctor`: what of this machine serves, and what to do about the rest.

Exit code 0 where nothing stands in the way of a run, 1 where something does. Being offline is no problem.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from peft_mlm.console import CommandParser

PROBLEMS = 1


def doctor() -> dict[str, Any]:
    """Check Python, libraries, GPU, quantisation, memory, disk and the hub; libraries in processes of their own.

    Returns:
        `ok` (no check is a problem), and `checks`: per check `name`, `state` ("ok", "note" or "problem"), `found` and
        `remedy` ("" where nothing is to be done).
    """
    from peft_mlm.diagnosis import diagnose

    checks = diagnose()
    return {
        "ok": all(check.state != "problem" for check in checks),
        "checks": [check.describe() for check in checks],
    }


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    _parser().read(words)
    return doctor()


def show(record: dict[str, Any]) -> None:
    """Print the result for people: by hand, since a broken library must not keep it back."""
    checks = record["checks"]
    width = max(40, min(110, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 110
    names = max(len(check["name"]) for check in checks)
    for check in checks:
        lead = f"{check['state']:<8} {check['name']:<{names}}  "
        print(textwrap.fill(check["found"], width, initial_indent=lead, subsequent_indent=" " * len(lead)))
        if check["remedy"]:
            arrow = " " * (len(lead) - 3) + "-> "
            print(textwrap.fill(check["remedy"], width, initial_indent=arrow, subsequent_indent=" " * len(lead)))
    problems = sum(check["state"] == "problem" for check in checks)
    notes = sum(check["state"] == "note" for check in checks)
    print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}, {notes} note{'' if notes == 1 else 's'}")


def exit_code(record: dict[str, Any]) -> int:
    """Give the exit code: 1 where a check is a problem."""
    return 0 if record["ok"] else PROBLEMS


def help_text() -> str:
    """Give the text of `peft-mlm doctor --help`."""
    return _parser().format_help()


def _parser() -> CommandParser:
    parser = CommandParser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
