from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_mlm.errors import DataError
from peft_mlm.text_files import read_text_files
from peft_mlm.text_formats import FORMATS

# What readers of tables and lines like to change: words for "missing", numbers, dates, quotes, separators, spaces.
HARD = [
    "NA",
    "null",
    "None",
    "nan",
    "007",
    "1e5",
    "2024-01-01",
    'He said "no", twice; and left.',
    '"',
    "a\\b",
    " leading and trailing ",
    "café 抗体 🧬",
    "line\u2028separator\x0bkept\x85",
    "'single' quotes",
    "#comment",
    ">not a header",
    "x" * 200_000,
]
WITH_BREAKS = [*HARD, "two\nlines", "tab\tin it"]


def write_txt(texts: list[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def write_table(texts: list[str], delimiter: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return buffer.getvalue().encode()


def write_parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), buffer)
    return buffer.getvalue()


def write_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_json(texts: list[str]) -> bytes:
    return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=2).encode()


def write_zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.txt", content)
    return buffer.getvalue()


def write_zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".txt": write_txt,
    ".csv": lambda texts: write_table(texts, ","),
    ".tsv": lambda texts: write_table(texts, "\t"),
    ".json": write_json,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": write_zst,
}


def read(file: Path, column: str | None = None) -> list[str | None]:
    texts: list[str | None] = read_text_files([str(file)], column, str(file.parent / "cache")).dataset["text"][:]
    return texts


def read_bytes(folder: Path, name: str, content: bytes | str, column: str | None = None) -> list[str | None]:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(file, column)


@pytest.mark.parametrize("ending", WRITERS)
def test_texts_come_back_exactly_as_they_were_written(tmp_path: Path, ending: str) -> None:
    texts = HARD if ending == ".txt" else WITH_BREAKS
    assert read_bytes(tmp_path, f"texts{ending}", WRITERS[ending](texts)) == texts


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("ending", WRITERS)
def test_a_compressed_file_gives_the_texts_of_the_plain_one(tmp_path: Path, ending: str, compression: str) -> None:
    content = COMPRESSORS[compression](WRITERS[ending](HARD))
    assert read_bytes(tmp_path, f"texts{ending}{compression}".upper(), content) == HARD


def test_a_zip_archive_gives_the_texts_of_the_one_file_in_it(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "archive.zip", write_zip(write_txt(HARD))) == HARD


def test_compressed_streams_put_one_after_another_are_read_to_the_end(tmp_path: Path) -> None:
    for ending, compress in COMPRESSORS.items():
        assert read_bytes(tmp_path, f"two.txt{ending}", compress(b"one\n") + compress(b"two\n")) == ["one", "two"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6))
def test_any_text_survives_in_every_format_that_can_hold_it(tmp_path: Path, texts: list[str]) -> None:
    # csv reads a lone carriage return in quotes as it is; plain text cannot hold line breaks.
    for ending in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        file = tmp_path / f"any{ending}"
        file.write_bytes(WRITERS[ending](texts))
        assert list(FORMATS[ending].texts(file, "text")) == texts
    lines = [text.replace("\r", "").replace("\n", "") for text in texts]
    file = tmp_path / "any.txt"
    file.write_bytes(write_txt(lines))
    assert list(FORMATS[".txt"].texts(file, "text")) == [line.removeprefix("\ufeff") for line in lines[:1]] + lines[1:]


def test_fasta_records_are_joined_and_nothing_but_sequence_is_kept(tmp_path: Path) -> None:
    fasta = ">one a description\nMKV\nLL*\n\n; a comment\n>two\nac gt\n>empty\n>three\nMK*VX\n"
    expected = ["MKVLL", "acgt", "", "MK*VX"]
    files: dict[str, bytes | str] = {
        "unix.fasta": fasta,
        "windows.fa": "\ufeff" + fasta.replace("\n", "\r\n"),
        "cut.faa": fasta.rstrip("\n"),
        "packed.fna.gz": gzip.compress(fasta.encode()),
    }
    for name, content in files.items():
        assert read_bytes(tmp_path, name, content) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "one\ntwo\n"),
        ("texts.csv", "text,label\none,1\ntwo,2\n"),
        ("texts.tsv", "label\ttext\n1\tone\n2\ttwo\n"),
        ("texts.json", '[{"text": "one"},\n{"text": "two"}]\n'),
        ("texts.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'),
    ],
)
def test_byte_order_marks_and_windows_line_ends_are_no_text(tmp_path: Path, name: str, content: str) -> None:
    assert read_bytes(tmp_path, name, "\ufeff" + content.replace("\n", "\r\n")) == ["one", "two"]


def test_json_may_be_an_array_of_strings_or_lines_of_strings(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "array.json", ' \n ["a", "b"]') == ["a", "b"]
    assert read_bytes(tmp_path, "lines.jsonl", '"a"\n"b"\n') == ["a", "b"]


def test_what_is_missing_in_a_row_is_an_empty_text(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": null}\n{"id": 3}\n') == ["a", None, None]
    assert read_bytes(tmp_path, "a.csv", "id,text\n1,a\n2,\n3\n\n4,b\n") == ["a", "", None, "b"]


def test_a_tsv_without_quoting_keeps_its_rows_and_its_quotation_marks(tmp_path: Path) -> None:
    rows = ['"Never," she said.', '"a lone mark', "plain", 'end"', '"all of it"']
    assert (
        read_bytes(tmp_path, "raw.tsv", "id\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows))) == rows
    )


def test_a_csv_may_be_separated_by_semicolons_or_tabs(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "semicolons.csv", "id;text\n1;a, b\n") == ["a, b"]
    assert read_bytes(tmp_path, "tabs.csv", "id\ttext\n1\ta, b; c\n") == ["a, b; c"]


def test_a_column_number_reads_a_table_without_a_header(tmp_path: Path) -> None:
    table = "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\t\"One more.\n"
    assert read_bytes(tmp_path, "cola.tsv", table, "4") == ["Our friends won't buy this.", '"One more.']
    assert read_bytes(tmp_path, "named.csv", "4,text\nfour,a\n", "4") == ["four"]
    with pytest.raises(DataError, match=r"Column '2' of .*cola\.tsv does not hold text; .*'1', '3', '4'"):
        read(tmp_path / "cola.tsv", "2")
    with pytest.raises(DataError, match=r"no column '5'.*no header row, give the column's number, 1 to 4"):
        read(tmp_path / "cola.tsv", "5")


def test_parquet_text_may_be_stored_in_any_of_its_string_types(tmp_path: Path) -> None:
    texts = ["a", None, "b"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(
            pa.table({"n": [1, 2, 3], "body": pa.array(texts, pa.string()).cast(kind)}), tmp_path / "a.parquet"
        )
        assert read(tmp_path / "a.parquet") == texts


FAULTS: dict[str, tuple[bytes | str, str]] = {
    "empty.txt": ("", "There is no text"),
    "blank.txt": ("\n \n\t\n", "There is no text"),
    "empty.csv": ("", "There is no text"),
    "header.csv": ("id,text\n", "There is no text"),
    "empty.json": ("", "There is no text"),
    "array.json": ("[]", "There is no text"),
    "empty.fasta": ("", "There is no text"),
    "empty.parquet": (write_parquet([]), "There is no text"),
    "empty.txt.gz": (gzip.compress(b""), "There is no text"),
    "latin.txt": ("café".encode("latin1"), "0xe9.*iconv -f latin1"),
    "latin.csv": ("text\ncafé\n".encode("latin1"), "0xe9.*iconv -f latin1"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin1"), "0xe9.*iconv -f latin1"),
    "windows.txt": ("text".encode("utf-16"), "iconv -f utf-16"),
    "binary.txt": (bytes(range(256)), "no text at all"),
    "cut.txt.gz": (gzip.compress(bytes(range(100)) * 99)[:-9], "cannot be unpacked.*damaged, cut off"),
    "cut.txt.bz2": (bz2.compress(b"text\n" * 999)[:-9], "cannot be unpacked.*damaged, cut off"),
    "cut.txt.xz": (lzma.compress(b"text\n" * 999)[:-30], "cannot be unpacked.*damaged, cut off"),
    "cut.txt.zst": (write_zst(b"text\n" * 999)[:-9], "cannot be read.*Mend it, or make or download"),
    "plain.txt.gz": ("text\n", "cannot be unpacked.*not a .gz file"),
    "plain.zip": ("text\n", "cannot be unpacked.*not a .zip file"),
    "cut.parquet": (write_parquet(["a"])[:-6], "cannot be read: .*Mend it"),
    "open.json": ('[{"text": "a"},', "cannot be read: .*line 1"),
    "open.jsonl": ('{"text": "a"}\n{"text":', "line 2 is not JSON"),
    "pretty.jsonl": ('{\n  "text": "a"\n}\n', "line 1 is not JSON.*an object per line"),
    "numbers.json": ("[1, 2]", "row 1 is 1, not an object"),
    "mixed.jsonl": ('{"text": "a"}\n{"text": 7}\n', "Column 'text' of .* does not hold text"),
    "late.jsonl": ('{"text": "a"}\n' * 1500 + '{"text": 7}\n', "line 1501 has 7 in column 'text', which is not text"),
    "commas.csv": ("text\nYes.\nHello, world\n", "line 3 has 2 cells, the first line 1.*double quotes"),
    "quotes.csv": ('id,text\n1,"a"b\n', "line 2 is not well-formed"),
    "open.csv": ('id,text\n1,"a\n', "line 2 is not well-formed"),
    "plain.fasta": ("MKV\n", "does not start with a FASTA header line"),
    "notes.md": ("text", "the ending .md.*rename it to one of .txt, .csv"),
    "notes": ("text", r"the ending \(none\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    with pytest.raises(DataError, match=message) as caught:
        read_bytes(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.arrow")), "half a file is left in the cache"


def test_an_archive_of_several_files_asks_to_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("b.txt", "b")
    with pytest.raises(DataError, match=r"two\.zip holds 2 files, and one is wanted: unpack it"):
        read(tmp_path / "two.zip")
