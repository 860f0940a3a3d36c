"""Local files -> text: which files and which column, read once and kept as Arrow.

Files are not read through `datasets.load_dataset`. For csv it turns the texts "NA" and "None" into nothing and drops
what follows an unquoted comma; it does not read a changed file again if its modification time is the old one; and for
each file it asks a server on the internet to count the load.
"""

from __future__ import annotations

import difflib
import glob
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import xxhash

from peft_mlm.errors import DataError
from peft_mlm.text_formats import FORMATS, Column, find_format, named_faults

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_TEXTS = 1000
# Above this size a file's reading shows a progress bar.
_LARGE_BYTES = 64 << 20
# Part of the cache key: raise it when other texts are read from the same file.
_READER_VERSION = 1


class TextFiles(NamedTuple):
    """The texts of some files, blank ones included, on disk as one Arrow column named "text"."""

    dataset: Dataset
    files: list[Path]
    column: str


def read_text_files(patterns: Sequence[str], text_column: str | None, cache_dir: str | None) -> TextFiles:
    """Read the text of local files, in the order given; the files of a glob in the order of their names.

    A file is read once and kept as Arrow, under a name made of its content: a changed file is read again, an unchanged
    one never, wherever it lies and whatever its modification time.

    Args:
        patterns: Names and globs (`**` too) of files; each file is read once. The format is told by the ending.
        text_column: Column that holds the text; else `text`, or the only text column. In csv and tsv without a header
            row, the number of the column, the first being 1.
        cache_dir: Where to keep the Arrow files; `datasets`' own cache if None.

    Returns:
        The texts, the files, and the names of the columns they came from.

    Raises:
        DataError: If a file is missing, of an unknown format, empty or damaged, or its text column cannot be told.
    """
    from datasets import concatenate_datasets

    files = find_files(patterns)
    parts, chosen = [], []
    for file in files:
        with named_faults(file):
            format_ = find_format(file)
            columns = FORMATS[format_].columns(file)
            if not columns:
                raise DataError(f"There is no text in {file}: it is empty.")
            column = _choose_file_column(columns, text_column, file, format_)
        chosen.append(column)
        parts.append(_read_cached(file, format_, column, cache_dir))
    return TextFiles(concatenate_datasets(parts), files, ", ".join(dict.fromkeys(chosen)))


class TextRows(NamedTuple):
    """The rows of some files, with all their columns.

    Attributes:
        rows: Values by column, in the order of the files.
        texts: Of each row, its text; "" where it has none.
        columns: Names of all columns, in the order in which they come up.
    """

    rows: list[dict[str, Any]]
    texts: list[str]
    columns: list[str]


def read_rows(
    patterns: Sequence[str], text_column: str | None, *, usual: Sequence[str] = (), option: str = "--text_column"
) -> TextRows:
    """Read local files with all their columns, into memory.

    Args:
        patterns: As in `read_text_files`.
        text_column: As there.
        usual: Names of columns to take where none is asked for, the first that a file has.
        option: What the column is asked for by, for messages.

    Returns:
        The rows.

    Raises:
        DataError: As in `read_text_files`; but a file may have blank texts only.
    """
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    for file in find_files(patterns):
        with named_faults(file):
            format_ = find_format(file)
            columns = FORMATS[format_].columns(file)
            if not columns:
                raise DataError(f"There is no text in {file}: it is empty.")
            names = [name for name, _ in columns]
            wanted = text_column or next((name for name in usual if name in names), None)
            try:
                column = _choose_file_column(columns, wanted, file, format_)
            except DataError as error:
                raise DataError(str(error).replace("--text_column", option)) from None
            for row in FORMATS[format_].rows(file, column):
                rows.append(row)
                texts.append(row.get(column) or "")
    return TextRows(rows, texts, list(dict.fromkeys(name for row in rows for name in row)))


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Find the files of some names and globs; nothing is read, and nothing heavy imported.

    Args:
        patterns: As in `read_text_files`.

    Returns:
        The files, each once.

    Raises:
        DataError: If a file is missing, or of an unknown format.
    """
    files = list(dict.fromkeys(file for pattern in patterns for file in _expand(pattern)))
    for file in files:
        with named_faults(file):
            find_format(file)
    return files


def first_text(patterns: Sequence[str], text_column: str | None) -> str | None:
    """Read the first text of local files, and no more of them.

    Args:
        patterns: As in `read_text_files`.
        text_column: As there.

    Returns:
        The first text that is not blank; None if there is none.

    Raises:
        DataError: As there.
    """
    for file in find_files(patterns):
        with named_faults(file):
            format_ = find_format(file)
            column = _choose_file_column(FORMATS[format_].columns(file), text_column, file, format_)
            for text in FORMATS[format_].texts(file, column):
                if text and not text.isspace():
                    return text
    return None


def choose_column(columns: Sequence[Column], text_column: str | None, where: str) -> str:
    """Choose the column that holds the text.

    Args:
        columns: Names and kinds of the columns.
        text_column: The name asked for, if any.
        where: What has these columns, for messages.

    Returns:
        `text_column`, else `text`, else the only column of the kind "text".

    Raises:
        DataError: If there is no such column, it does not hold text, or there is not exactly one to choose.
    """
    names = [name for name, _ in columns]
    if text_column is not None or "text" in names:
        name = "text" if text_column is None else text_column
        if name not in names:
            raise DataError(f"{where} has no column {name!r}: --text_column can be one of {_quoted(names)}.")
        if columns[names.index(name)][1] == "other":
            raise DataError(f"Column {name!r} of {where} does not hold text; {_text_columns(columns)}")
        return name
    text = [name for name, kind in columns if kind == "text"]
    if len(text) != 1:
        raise DataError(f"Which column of {where} holds the text? {_text_columns(columns)}")
    return text[0]


def listing(names: Iterable[Any], most: int = 20) -> str:
    """List names in a message.

    Args:
        names: What to list.
        most: How many to show.

    Returns:
        The names with commas between, and how many there are if they are not all shown.
    """
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" ... ({len(shown)} in all)" if len(shown) > most else "")


def _text_columns(columns: Sequence[Column]) -> str:
    text = [name for name, kind in columns if kind == "text"]
    if not text:
        return f"none of its columns does ({_quoted(name for name, _ in columns)}): give other text."
    return f"name one with --text_column: {_quoted(text)}."


def _quoted(names: Iterable[str]) -> str:
    # The first text of a file without a header passes for a name, and can be long.
    return listing(repr(name if len(name) <= 40 else f"{name[:40]}...") for name in names)


def _choose_file_column(columns: Sequence[Column], text_column: str | None, file: Path, format_: str) -> str:
    if format_ not in (".csv", ".tsv"):
        return choose_column(columns, text_column, str(file))
    numbered: list[Column] = [(str(number), kind) for number, (_, kind) in enumerate(columns, 1)]
    by_number = text_column in dict(numbered) and text_column not in dict(columns)
    try:
        return choose_column(numbered if by_number else columns, text_column, str(file))
    except DataError as error:
        hint = f"If the file has no header row, give the column's number, 1 to {len(columns)}."
        raise DataError(f"{error} {hint}") from None


def _expand(pattern: str) -> list[Path]:
    """Give the files that a name or a glob stands for, sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise DataError(f"{pattern} is a folder: name the files in it, such as {PurePath(pattern) / '*.txt'}.")
    if path.exists():
        return [path]
    if glob.has_magic(pattern):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        files = [found for name in matches if (found := Path(name)).is_file()]
        if not files:
            raise DataError(f"No file matches {pattern} (seen from {Path.cwd()}).")
        return files
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
    hint = f"; near it there is {', '.join(near)}" if near else ""
    raise DataError(f"There is no file {pattern} (seen from {Path.cwd()}){hint}.")


def _read_cached(file: Path, format_: str, column: str, cache_dir: str | None) -> Dataset:
    """Read a file once, and again whenever its content changes; its texts stay on disk."""
    import datasets

    hasher = xxhash.xxh3_128(repr((_READER_VERSION, format_, file.suffix.lower(), column)).encode())
    with named_faults(file), file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "peft_mlm"
    path = folder / f"{hasher.hexdigest()}.arrow"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_arrow(path, _batches(file, format_, column))
        except OSError as error:
            raise DataError(
                f"The texts of {file} cannot be kept in {folder} ({error}): make room there, or give another folder "
                "with --cache_dir."
            ) from error
    return datasets.Dataset.from_file(str(path))


def _write_arrow(path: Path, batches: Iterator[pa.Array]) -> None:
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    # Renamed when complete: another process, or the next run, never sees half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        features = Features({"text": Value("string")})
        # The fingerprint is what `datasets` names later results by, such as tokens: the same for the same content.
        with ArrowWriter(path=str(unfinished), features=features, fingerprint=path.stem) as writer:
            for batch in batches:
                writer.write_table(pa.table({"text": batch}))
            writer.finalize()
        unfinished.replace(path)


def _batches(file: Path, format_: str, column: str) -> Iterator[pa.Array]:
    from tqdm import tqdm

    large = file.stat().st_size > _LARGE_BYTES
    found = False
    with named_faults(file):
        texts = iter(
            tqdm(FORMATS[format_].texts(file, column), f"Reading {file.name}", disable=None if large else True)
        )
        while batch := list(islice(texts, _BATCH_TEXTS)):
            found = found or any(text and not text.isspace() for text in batch)
            yield pa.array(batch, pa.string())
    if not found:
        raise DataError(f"There is no text in {file}, column {column}: it is empty, or has only blank texts.")
