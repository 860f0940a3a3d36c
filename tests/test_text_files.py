from __future__ import annotations

import gzip
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peft_mlm.errors import DataError
from peft_mlm.text_files import TextFiles, choose_column, listing, read_rows, read_text_files
from peft_mlm.text_formats import Column


def write(file: Path, content: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return str(file)


def read(folder: Path, *patterns: str, column: str | None = None) -> TextFiles:
    return read_text_files(patterns, column, str(folder / "cache"))


def test_several_formats_are_read_in_the_order_given_and_each_file_once(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "z.txt", "from txt\n"),
        write(tmp_path / "b.csv", "id,sentence\n1,from csv\n"),
        write(tmp_path / "a.fasta", ">x\nMKV\n"),
        write(tmp_path / "c.jsonl", '{"body": "from json"}\n'),
    ]
    result = read(tmp_path, *files, str(tmp_path / "*.csv"))
    assert result.dataset["text"][:] == ["from txt", "from csv", "MKV", "from json"]
    assert result.files == [Path(file) for file in files]
    assert result.column == "text, sentence, sequence, body"


def test_a_glob_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.txt"):
        write(tmp_path / "texts" / name, f"{name}\n")
    (tmp_path / "texts" / "folder.txt").mkdir()
    assert read(tmp_path, str(tmp_path / "texts/*.txt")).dataset["text"][:] == ["a.txt", "b.txt"]
    assert read(tmp_path, str(tmp_path / "texts/**/*.txt")).dataset["text"][:] == [
        "a.txt",
        "b.txt",
        "deep/d.txt",
        "deep/er/c.txt",
    ]


@pytest.mark.parametrize("name", ["a[1].txt", "what?.txt", "a b#c%20é.txt", "x::y.txt", "*.txt"])
def test_a_file_whose_name_looks_like_a_pattern_is_still_that_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a1.txt", "another\n")
    assert read(tmp_path, write(tmp_path / name, "this\n")).dataset["text"][:] == ["this"]


def test_a_changed_file_is_read_anew_whatever_its_modification_time(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "old\n")
    before = Path(file).stat()
    assert read(tmp_path, file).dataset["text"][:] == ["old"]
    write(tmp_path / "a.txt", "new\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path(file).stat().st_size == before.st_size
    assert read(tmp_path, file).dataset["text"][:] == ["new"]


def test_an_unchanged_file_is_read_once_wherever_it_lies(tmp_path: Path) -> None:
    file = write(tmp_path / "one" / "a.txt", "same\n")
    first = read(tmp_path, file).dataset
    (arrow,) = tmp_path.rglob("*.arrow")
    written = arrow.stat().st_mtime_ns
    (tmp_path / "two").mkdir()
    second = read(tmp_path, shutil.copy(file, str(tmp_path / "two" / "b.txt"))).dataset
    assert second["text"][:] == ["same"]
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("*.arrow")] == [written]
    arrow.unlink()
    again = read(tmp_path, file).dataset
    # datasets names what it computes from a data set, such as tokens, by this.
    assert first._fingerprint == second._fingerprint == again._fingerprint


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "a.txt", f"{folder}\n") for folder in ("one", "two")]
    assert read(tmp_path, *files).dataset["text"][:] == ["one", "two"]


def test_another_column_of_the_same_file_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "question,answer\nwhy,because\n")
    assert read(tmp_path, file, column="question").dataset["text"][:] == ["why"]
    assert read(tmp_path, file, column="answer").dataset["text"][:] == ["because"]


def test_the_same_bytes_under_another_ending_are_read_in_that_format(tmp_path: Path) -> None:
    content = "text\none\n"
    assert read(tmp_path, write(tmp_path / "a.txt", content)).dataset["text"][:] == ["text", "one"]
    assert read(tmp_path, write(tmp_path / "a.csv", content)).dataset["text"][:] == ["one"]
    packed = gzip.compress(content.encode(), mtime=0)
    for name, texts in (("b.txt.gz", ["text", "one"]), ("b.csv.gz", ["one"])):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path, str(tmp_path / name)).dataset["text"][:] == texts


def test_local_text_is_read_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: Any, **options: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert read(tmp_path, write(tmp_path / "a.txt", "text\n")).dataset["text"][:] == ["text"]
    assert asked == []


def test_a_name_that_gives_no_file_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "letters.txt", "text\n")
    with pytest.raises(DataError, match=r"There is no file .*leters\.txt .*near it there is letters\.txt"):
        read(tmp_path, str(tmp_path / "leters.txt"))
    with pytest.raises(DataError, match=r"No file matches .*\*\.csv"):
        read(tmp_path, str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match=r"is a folder: name the files in it, such as .*\*\.txt"):
        read(tmp_path, str(tmp_path))


def test_one_empty_file_among_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no text in .*b\.txt"):
        read(tmp_path, write(tmp_path / "a.txt", "text\n"), write(tmp_path / "b.txt", ""))


def test_a_cache_that_cannot_be_written_is_named_with_its_option(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "text\n")
    write(tmp_path / "cache", "a file, not a folder")
    with pytest.raises(DataError, match=r"cannot be kept in .*cache.*--cache_dir"):
        read(tmp_path, file)


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ([("text", "text"), ("other", "text")], None, "text"),
        ([("id", "other"), ("body", "text"), ("note", "blank")], None, "body"),
        ([("text", "text"), ("other", "text")], "other", "other"),
        ([("id", "other"), ("note", "blank")], "note", "note"),
    ],
)
def test_the_text_column_is_the_named_one_or_text_or_the_only_one(
    columns: list[Column], wanted: str | None, expected: str
) -> None:
    assert choose_column(columns, wanted, "table.csv") == expected


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        ([("a", "text"), ("b", "other")], "c", "table.csv has no column 'c': --text_column can be one of 'a', 'b'."),
        ([("a", "text"), ("b", "text"), ("c", "other")], None, "Which column .*--text_column: 'a', 'b'."),
        ([("a", "other"), ("b", "blank")], None, r"none of its columns does \('a', 'b'\)"),
        ([("a", "text"), ("b", "other")], "b", "'b' of table.csv does not hold text; .*--text_column: 'a'"),
        ([("text", "other"), ("b", "text")], None, "'text' of table.csv does not hold text; .*--text_column: 'b'"),
    ],
)
def test_a_column_that_cannot_be_told_lists_those_that_can(
    columns: list[Column], wanted: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose_column(columns, wanted, "table.csv")


def test_columns_of_numbers_truth_values_and_nothing_hold_no_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "n,flag,nothing,words\n1,true,,one\n-2.5e3,False,,\nNA,null,,3\n")
    assert read(tmp_path, file).column == "words"


def test_a_long_list_is_cut_and_counted() -> None:
    assert listing("abc") == "a, b, c"
    assert listing(range(5), most=2) == "0, 1 ... (5 in all)"


def test_rows_are_read_with_all_their_columns_from_every_format(tmp_path: Path) -> None:
    table = {"name": ["one", "two"], "text": ["AB", None], "liked": [1.5, None]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("name,text,liked\none,AB,1.5\ntwo,,\n")
    (tmp_path / "c.jsonl").write_text('{"name": "one", "text": "AB", "liked": 1.5}\n{"name": "two", "text": null}\n')
    for file, nothing in (("a.parquet", None), ("b.csv", ""), ("c.jsonl", None)):
        found = read_rows([str(tmp_path / file)], None)
        assert found.columns == ["name", "text", "liked"]
        assert found.texts == ["AB", ""]
        assert [row["name"] for row in found.rows] == ["one", "two"]
        assert (float(found.rows[0]["liked"]), found.rows[1].get("liked")) == (1.5, nothing)


def test_rows_of_tables_without_a_header_of_fasta_and_of_plain_text_have_columns_too(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\tAB\ny\tCD\n")
    (tmp_path / "b.fasta").write_text(">n 1\nAB\nCD\n")
    (tmp_path / "c.txt").write_text("AB\n\nCD\n")
    assert read_rows([str(tmp_path / "a.tsv")], "2").rows == [{"1": "x", "2": "AB"}, {"1": "y", "2": "CD"}]
    assert read_rows([str(tmp_path / "b.fasta")], None).rows == [{"name": "n 1", "sequence": "ABCD"}]
    both = read_rows([str(tmp_path / "c.txt"), str(tmp_path / "b.fasta")], None)
    assert (both.texts, both.columns) == (["AB", "", "CD", "ABCD"], ["text", "name", "sequence"])


def test_the_usual_name_of_a_column_is_taken_and_a_missing_one_named_by_its_option(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant,text\nA1B,x\n")
    assert read_rows([str(tmp_path / "a.csv")], None, usual=("mutation", "mutant")).texts == ["A1B"]
    with pytest.raises(DataError, match="--column can be one of 'mutant', 'text'"):
        read_rows([str(tmp_path / "a.csv")], "other", option="--column")
