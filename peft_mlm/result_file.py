"""Results written row by row into a file that the same job can go on with, after whatever stopped it.

Beside `scores.csv` lies `scores.csv.job.json`: what the job is (by content: digests of weights and of the text), and
how many rows and bytes of the file are whole. Rows are added in steps; one that was cut short is taken back. Where the
steps of a job are always of the same rows, a job that was stopped gives what it would have given otherwise.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from peft_mlm.errors import RunFolderError
from peft_mlm.run_folder import finite, read_json, write_json

ENDINGS = (".csv", ".tsv", ".jsonl")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JOB_SUFFIX = ".job.json"
OTHER_FILE = "Give another --output_file, or move this one away."


class ResultFile:
    """A file of results that is open for more; made by `open_results`.

    Args:
        path: The file.
        stream: The file, open for reading and writing.
        record: What lies beside it.
        columns: Names of the columns of csv and tsv.

    Raises:
        RunFolderError: The file was changed since its job wrote it.
    """

    def __init__(self, path: Path, stream: BinaryIO, record: dict[str, Any], columns: Sequence[str]) -> None:
        self._path, self._stream, self._record, self._columns = path, stream, record, list(columns)
        self._digest = xxhash.xxh3_128()
        stream.seek(0)
        self._digest.update(stream.read(record["bytes"]))
        if self._digest.hexdigest() != record["xxh3_128"]:
            raise RunFolderError(f"{path} was changed since its job wrote it: it cannot be gone on with. {OTHER_FILE}")
        stream.truncate(record["bytes"])

    @property
    def rows(self) -> int:
        """How many rows are whole."""
        return int(self._record["rows"])

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` was told, or None."""
        summary: dict[str, Any] | None = self._record["summary"]
        return summary

    def read(self) -> list[dict[str, Any]]:
        """Read the rows that are there; in csv and tsv all values are strings."""
        self._stream.seek(0)
        text = self._stream.read().decode()
        if self._path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS[self._path.suffix]))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; they are on the disk before they count.

        Args:
            rows: Values by column.
        """
        added = self._format(rows).encode()
        self._stream.seek(self._record["bytes"])
        self._stream.write(added)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._digest.update(added)
        self._record |= {
            "rows": self.rows + len(rows),
            "bytes": self._record["bytes"] + len(added),
            "xxh3_128": self._digest.hexdigest(),
        }
        write_json(_job_file(self._path), self._record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say that the job is done.

        Args:
            summary: Its figures.
        """
        self._record["summary"] = dict(summary)
        write_json(_job_file(self._path), self._record)

    def _format(self, rows: Sequence[Mapping[str, Any]]) -> str:
        if self._path.suffix == ".jsonl":
            return "".join(json.dumps(finite(dict(row)), ensure_ascii=False, default=str) + "\n" for row in rows)
        text = io.StringIO(newline="")
        table = csv.writer(text, delimiter=DELIMITERS[self._path.suffix], lineterminator="\n")
        if self._record["bytes"] == 0:
            table.writerow(self._columns)
        table.writerows([_cell(row.get(name)) for name in self._columns] for row in rows)
        return text.getvalue()


def check_result_file(path: Path, job: Mapping[str, Any]) -> None:
    """Refuse a file that cannot be written, or that is not one of this job; nothing is changed.

    Args:
        path: The file.
        job: What the job is, as far as is known yet.

    Raises:
        RunFolderError: Its ending is unknown, its folder is not there, or it is in the way.
    """
    if path.suffix not in ENDINGS:
        raise RunFolderError(f"{path} has the ending {path.suffix or '(none)'}: give one of {', '.join(ENDINGS)}.")
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder: give the name of a file.")
    if path.exists():
        _read_record(path, job)


@contextlib.contextmanager
def open_results(
    path: Path, job: Mapping[str, Any], columns: Sequence[str], about: Mapping[str, Any]
) -> Iterator[ResultFile]:
    """Open a file for the results of a job, or for the rest of them.

    Args:
        path: The file; .csv, .tsv or .jsonl.
        job: What the job is: values by name, by which the file is known again.
        columns: Names of the columns of csv and tsv.
        about: What else is to stand beside it, such as versions.

    Yields:
        The file.

    Raises:
        RunFolderError: The file is another job's, was changed, or is being written by another process.
    """
    check_result_file(path, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        nothing = xxhash.xxh3_128().hexdigest()
        empty = {"rows": 0, "bytes": 0, "xxh3_128": nothing, "summary": None}
        write_json(_job_file(path), {"job": dict(job), **empty, **about})
        path.touch(exist_ok=False)
    with path.open("r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderError(f"{path} is being written by another process. {OTHER_FILE}") from error
        yield ResultFile(path, stream, _read_record(path, job), columns)


def _read_record(path: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    if not _job_file(path).is_file():
        raise RunFolderError(f"{path} exists already, and is nothing that can be gone on with. {OTHER_FILE}")
    record: dict[str, Any] = read_json(_job_file(path))
    other = [
        _tell(name, record["job"].get(name), value) for name, value in job.items() if record["job"].get(name) != value
    ]
    if other:
        raise RunFolderError(f"{path} holds the results of another job: {'; '.join(other)}. {OTHER_FILE}")
    return record


def _tell(name: str, there: Any, here: Any) -> str:
    shown = [json.dumps(value, ensure_ascii=False) for value in (there, here)]
    return f"{name} is another" if max(map(len, shown)) > 30 else f"{name} is {shown[0]} there and {shown[1]} here"


def _job_file(path: Path) -> Path:
    return path.with_name(path.name + JOB_SUFFIX)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return repr(value) if value == value else ""
    if isinstance(value, list | dict):
        return json.dumps(finite(value), ensure_ascii=False, default=str)
    return "" if value is None else value
