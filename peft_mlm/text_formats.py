"""Formats of text files: which columns a file has, and the texts of one of them, one at a time.

One row per ending in `FORMATS`. Faults are ValueErrors and the like that say where in the file; `named_faults` makes
DataErrors of them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from peft_mlm.errors import DataError

# Rows looked at to tell the text columns of csv, tsv and json, which do not declare them.
_SAMPLE_ROWS = 1000
_PARQUET_ROWS = 1000
# Cells that do not make a column of csv or tsv a text column; numbers neither.
_NOT_TEXT = {"", "true", "false", "na", "n/a", "nan", "null", "none"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

# A "blank" column has only empty cells: it can be named, but it is never chosen.
Kind = Literal["text", "other", "blank"]
Column = tuple[str, Kind]


class Format(NamedTuple):
    """How to read files with one ending.

    Attributes:
        columns: Names and kinds of a file's columns; none if the file is empty.
        texts: The texts in one column; None where a row has none.
        rows: The rows with all their columns, given one of them; a FASTA file's have their `name` too.
    """

    columns: Callable[[Path], list[Column]]
    texts: Callable[[Path, str], Iterator[str | None]]
    rows: Callable[[Path, str], Iterator[dict[str, Any]]]


def find_format(file: Path) -> str:
    """Tell the format of a file by its name, compression set aside.

    Args:
        file: A file; a zip archive holds one file, and that one's name counts.

    Returns:
        An ending among `FORMATS`.

    Raises:
        DataError: If the ending is another.
    """
    name = PurePath(_archived(file) if file.suffix.lower() == ".zip" else file.name)
    if name.suffix.lower() in _COMPRESSED:
        name = name.with_suffix("")
    format_ = name.suffix.lower()
    if format_ not in FORMATS:
        raise DataError(
            f"{file} has the ending {format_ or '(none)'}, and from it the format cannot be told: rename it to one of "
            f"{', '.join(FORMATS)}, plain or with {', '.join(_COMPRESSED)} after it."
        )
    return format_


@contextmanager
def named_faults(file: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError.

    Args:
        file: The file that is read.

    Yields:
        None: Nothing; the block runs inside.

    Raises:
        DataError: With the file's name, the fault and a remedy, in place of the fault.
    """
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: it holds the byte 0x{error.object[error.start]:02x}. {_encoding_remedy(error)}"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} cannot be unpacked ({error}): it is damaged, cut off, or not a {file.suffix} file. Make or "
            "download it again."
        ) from error
    except (OSError, ValueError, RuntimeError, csv.Error, pa.ArrowException) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{file} cannot be read: {reason}. Mend it, or make or download it again.") from error


def _encoding_remedy(error: UnicodeDecodeError) -> str:
    start = bytes(error.object[:1000])
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "It seems to be UTF-16; convert it with: iconv -f utf-16 -t utf-8."
    if b"\0" in start:
        return "It seems to be no text at all: give another file, or mend its name if it is compressed."
    return "If it is Latin-1, convert it with: iconv -f latin1 -t utf-8."


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    suffix = file.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(file) as archive, archive.open(_archived(file)) as member:
            yield cast(BinaryIO, member)
    elif suffix == ".zst":
        with pa.CompressedInputStream(pa.OSFile(str(file)), "zstd") as stream:
            yield stream
    else:
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        opener = openers.get(suffix, open)
        with opener(file, "rb") as stream:
            yield stream


def _archived(file: Path) -> str:
    """Give the name of the one file in a zip archive."""
    with zipfile.ZipFile(file) as archive:
        names = [m.filename for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(names) != 1:
        raise DataError(f"{file} holds {len(names)} files, and one is wanted: unpack it, and name the files or a glob.")
    return names[0]


@contextmanager
def _text_opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    # utf-8-sig: files from Windows often start with a byte order mark, which is no part of the first text.
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as text:
        yield text


def _txt_texts(file: Path, column: str) -> Iterator[str]:
    with _text_opened(file) as lines:
        for line in lines:
            yield line.rstrip("\n")


def _txt_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    return ({column: text} for text in _txt_texts(file, column))


def _fasta_texts(file: Path, column: str) -> Iterator[str]:
    return (row[column] for row in _fasta_rows(file, column))


def _fasta_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """Join the lines of each record; the `*` that marks a protein's stop is no residue and is left out at the end."""
    name = ""
    record: list[str] | None = None
    with _text_opened(file) as lines:
        for line in lines:
            if line.startswith(">"):
                if record is not None:
                    yield {"name": name, column: "".join(record).rstrip("*")}
                name, record = line[1:].strip(), []
            elif record is not None and not line.startswith(";"):
                record.append("".join(line.split()))
            elif record is None and line.strip() and not line.startswith(";"):
                raise ValueError("it does not start with a FASTA header line (>name)")
    if record is not None:
        yield {"name": name, column: "".join(record).rstrip("*")}


def _csv_rows(file: Path) -> Generator[list[str], None, None]:
    """Give the rows, header included, without blank lines; a row with more cells than the first one is a fault."""
    csv.field_size_limit(2**31 - 1)
    tabs = find_format(file) == ".tsv"
    quoting: Any = csv.QUOTE_NONE if tabs and not _is_quoted(file) else csv.QUOTE_MINIMAL
    with _text_opened(file, newline="") as lines:
        first = lines.readline()
        # A header holds names, not sentences: the delimiter it has most of is the file's.
        delimiter = "\t" if tabs else max(",;\t", key=first.count)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, quoting=quoting, strict=True)
        width = 0
        while row := _next_row(reader):
            width = width or len(row)
            if len(row) > width:
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} cells, the first line {width}: a cell that holds "
                    f"{delimiter!r} must stand in double quotes"
                )
            yield row


def _next_row(reader: Any) -> list[str]:
    """Give the next row that is not blank; at the end an empty list."""
    try:
        return next((row for row in reader if row), [])
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not well-formed csv: {error}") from error


def _is_quoted(file: Path) -> bool:
    """Tell whether a tsv file quotes its cells: many do not, and in these a cell may start with a quotation mark."""
    with _text_opened(file, newline="") as lines:
        try:
            for _ in csv.reader(lines, delimiter="\t", strict=True):
                pass
        except csv.Error:
            return False
    return True


def _csv_columns(file: Path) -> list[Column]:
    with closing(_csv_rows(file)) as rows:
        header = next(rows, [])
        sample = list(islice(rows, _SAMPLE_ROWS))
    return [(name, _cells_kind(row[i] for row in sample if i < len(row))) for i, name in enumerate(header)]


def _cells_kind(cells: Iterable[str]) -> Kind:
    kind: Kind = "blank"
    for cell in cells:
        if cell.strip().lower() not in _NOT_TEXT:
            try:
                float(cell)
            except ValueError:
                return "text"
        if cell.strip():
            kind = "other"
    return kind


def _csv_texts(file: Path, column: str) -> Iterator[str | None]:
    header, rows = _csv_table(file, column)
    index = header.index(column)
    for row in rows:
        yield row[index] if index < len(row) else None


def _csv_dicts(file: Path, column: str) -> Iterator[dict[str, Any]]:
    header, rows = _csv_table(file, column)
    for row in rows:
        yield dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))


def _csv_table(file: Path, column: str) -> tuple[list[str], Iterator[list[str]]]:
    """Give the names of the columns and the rows; without a header, columns are named by their numbers from 1."""
    rows: Iterator[list[str]] = _csv_rows(file)
    header = next(rows, [])
    if column in header:
        return header, rows
    # A column's number: there is no header, and the first row is a row like the others.
    return [str(number) for number in range(1, len(header) + 1)], chain([header], rows)


def _json_rows(file: Path) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Give each row and where it stands; a file is one array, or an object (or a string) per line."""
    with _text_opened(file) as lines:
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("["):
            values = enumerate(json.loads(first + lines.read()), 1)
            numbered: Iterator[tuple[str, Any]] = ((f"row {n}", value) for n, value in values)
        else:
            numbered = _json_lines(chain([first], lines))
        for where, value in numbered:
            row = {"text": value} if isinstance(value, str) else value
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {json.dumps(row)[:40]}, not an object with a text column")
            yield where, row


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} is not JSON ({error}); wanted is one array of objects, or an object per line"
                ) from error


def _json_columns(file: Path) -> list[Column]:
    types: dict[str, set[type]] = {}
    with closing(_json_rows(file)) as rows:
        for _, row in islice(rows, _SAMPLE_ROWS):
            for name, value in row.items():
                types.setdefault(name, set()).update([] if value is None else [type(value)])
    return [(name, ("text" if found == {str} else "other") if found else "blank") for name, found in types.items()]


def _json_texts(file: Path, column: str) -> Iterator[str | None]:
    for where, row in _json_rows(file):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where} has {json.dumps(value)[:40]} in column {column!r}, which is not text")
        yield value


def _json_dicts(file: Path, column: str) -> Iterator[dict[str, Any]]:
    texts = _json_texts(file, column)  # sees that they are texts
    return (row for (_, row), _ in zip(_json_rows(file), texts, strict=True))


@contextmanager
def _parquet_opened(file: Path) -> Iterator[pq.ParquetFile]:
    # A parquet file is read from its end, which a compressed stream cannot do.
    with _opened(file) as stream:
        yield pq.ParquetFile(pa.BufferReader(stream.read()) if file.suffix.lower() in _COMPRESSED else stream)


def _parquet_columns(file: Path) -> list[Column]:
    with _parquet_opened(file) as table:
        return [(field.name, _arrow_kind(field.type)) for field in table.schema_arrow]


def _arrow_kind(kind: pa.DataType) -> Kind:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "text" if text else "blank" if pa.types.is_null(kind) else "other"


def _parquet_texts(file: Path, column: str) -> Iterator[str | None]:
    with _parquet_opened(file) as table:
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
            yield from batch.column(column).to_pylist()


def _parquet_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    with _parquet_opened(file) as table:
        for batch in table.iter_batches(_PARQUET_ROWS):
            yield from batch.to_pylist()


# One row per ending. A new format is a row here and a row in the tests.
FORMATS = {
    ".txt": Format(lambda file: [("text", "text")], _txt_texts, _txt_rows),
    ".csv": Format(_csv_columns, _csv_texts, _csv_dicts),
    ".tsv": Format(_csv_columns, _csv_texts, _csv_dicts),
    ".json": Format(_json_columns, _json_texts, _json_dicts),
    ".jsonl": Format(_json_columns, _json_texts, _json_dicts),
    ".parquet": Format(_parquet_columns, _parquet_texts, _parquet_rows),
    ".fasta": Format(lambda file: [("sequence", "text")], _fasta_texts, _fasta_rows),
    ".fa": Format(lambda file: [("sequence", "text")], _fasta_texts, _fasta_rows),
    ".faa": Format(lambda file: [("sequence", "text")], _fasta_texts, _fasta_rows),
    ".fna": Format(lambda file: [("sequence", "text")], _fasta_texts, _fasta_rows),
}
