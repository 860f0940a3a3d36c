"""`peft-mlm report`: what a run was and gave, on one page; several runs side by side.

The page is HTML that needs no other file and no network, or Markdown for a README. It is made from the files of the run
folder alone, for runs that are not finished too; no local path and no token is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, print_table
from peft_mlm.errors import ArgumentsError, RunFolderError

DEFAULT_FILES = ("report.html", "report.md")
FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown"}


def report(*runs: str | Path, output_file: str | Path | None = None) -> dict[str, Any]:
    """Write the report of one run, or of several side by side.

    Args:
        *runs: Run folders.
        output_file: Where to write: HTML for .html, Markdown for .md. None writes report.html and report.md into the
            run folder. A report that was written here before is replaced, unless someone has changed it.

    Returns:
        `files` (what was written), and `runs`: for each its record, as `run_record.read_run` gives it.

    Raises:
        ArgumentsError: No run is given, several without a file to write, an unknown ending, or no matplotlib for HTML.
        RunFolderError: A folder holds no run, or something that is no report of ours stands in the way.
        DamagedFileError: A file of a run is damaged.
    """
    from peft_mlm.plots import check_drawing
    from peft_mlm.report_page import render_html, render_markdown
    from peft_mlm.run_folder import write_text
    from peft_mlm.run_record import read_runs

    files = _files(runs, output_file)
    if any(FORMATS[file.suffix.lower()] == "html" for file in files):
        check_drawing()
    for file in files:
        _check_file(file)
    records = read_runs(runs)
    render = {"html": render_html, "markdown": render_markdown}
    texts = [render[FORMATS[file.suffix.lower()]](records) for file in files]
    for file, text in zip(files, texts, strict=True):
        try:
            write_text(file, text)
        except OSError as error:
            raise RunFolderError(f"{file} cannot be written: {error.strerror}. Give another --output_file.") from error
    return {"files": [str(file) for file in files], "runs": records}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return report(*given.run, output_file=given.output_file)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [[told["name"], "finished" if told["summary"].get("status") == "finished" else "not finished"]
            for told in record["runs"]]  # fmt: skip
    rows += [["written", file] for file in record["files"]]
    print_table("report", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm report --help`."""
    return _parser().format_help()


def _files(runs: Sequence[str | Path], output_file: str | Path | None) -> list[Path]:
    if not runs:
        raise ArgumentsError("Name the run folder to report on; several are set side by side.")
    if output_file is None:
        if len(runs) > 1:
            raise ArgumentsError("Several runs belong to no one folder. Say where to write: --output_file report.html.")
        return [Path(runs[0]).expanduser() / name for name in DEFAULT_FILES]
    file = Path(output_file).expanduser()
    if file.suffix.lower() not in FORMATS:
        raise ArgumentsError(f"--output_file {output_file} has no ending that says what to write. Use .html or .md.")
    return [file]


def _check_file(file: Path) -> None:
    """Check, without writing, that nothing is lost if the file is written."""
    from peft_mlm.report_page import is_untouched_report

    if file.is_dir():
        raise RunFolderError(f"{file} is a folder. Give another --output_file.")
    if not file.exists():
        return
    try:
        ours = is_untouched_report(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise RunFolderError(
            f"{file} is no report of peft-mlm, or was changed since it was written; it is not overwritten. Give "
            "another --output_file, or move it away."
        )


def _parser() -> CommandParser:
    parser = CommandParser("report", __doc__)
    parser.add_argument("run", nargs="+", help="run folder (output_dir of a training); several are set side by side")
    parser.add_argument(
        "--output_file",
        help="where to write: .html or .md (default: report.html and report.md in the run folder; needed for several)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
