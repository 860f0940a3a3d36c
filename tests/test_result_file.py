"""A file of results goes on where its job stopped, and is no other job's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peft_mlm.errors import RunFolderError
from peft_mlm.result_file import ENDINGS, check_result_file, open_results

JOB = {"method": "original", "text": "0123456789abcdef0123456789abcdef"}
COLUMNS = ["text", "score", "tokens"]
ROWS: list[dict[str, Any]] = [
    {"text": 'a, "b"\n\tc', "score": -0.1, "tokens": ["a", "b"]},
    {"text": "é🙂", "score": math.nan, "tokens": []},
    {"text": "", "score": 1e-300, "tokens": None},
]


def write(path: Path, *parts: list[dict[str, Any]]) -> None:
    with open_results(path, JOB, COLUMNS, {}) as results:
        for part in parts:
            results.append(part)


@pytest.mark.parametrize("ending", ENDINGS)
def test_parts_in_several_goes_make_the_same_file_as_all_at_once_and_are_read_back(ending: str, tmp_path: Path) -> None:
    whole, parted = tmp_path / f"whole{ending}", tmp_path / "new" / f"parted{ending}"
    write(whole, ROWS)
    for number in range(3):
        write(parted, ROWS[number : number + 1])
    assert parted.read_bytes() == whole.read_bytes()
    with open_results(parted, JOB, COLUMNS, {}) as results:
        read = results.read()
        assert results.rows == 3
    assert [row["text"] for row in read] == [row["text"] for row in ROWS]
    assert float(read[0]["score"]) == -0.1
    assert read[1]["score"] in ("", None)
    assert float(read[2]["score"]) == 1e-300


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_written_after_the_last_whole_part_is_taken_back(ending: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"results{ending}", tmp_path / f"whole{ending}"
    write(path, ROWS[:2])
    with path.open("a", encoding="utf-8") as stream:
        stream.write('"half a li')
    write(path, ROWS[2:])
    write(whole, ROWS)
    assert path.read_bytes() == whole.read_bytes()


def test_a_job_that_was_stopped_before_its_first_row_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path)
    assert path.read_bytes() == b""
    path.unlink()  # stopped between the two files
    write(path, ROWS)
    assert path.read_text(encoding="utf-8").startswith("text,score,tokens\n")


def test_a_finished_job_tells_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with open_results(path, JOB, COLUMNS, {"environment": "here"}) as results:
        assert results.summary is None
        results.append(ROWS)
        results.finish({"mean": 1.5})
    with open_results(path, JOB, COLUMNS, {}) as results:
        assert results.summary == {"mean": 1.5}
    record = json.loads((tmp_path / "results.jsonl.job.json").read_text())
    assert (record["job"], record["environment"], record["rows"]) == (JOB, "here", 3)


def test_files_that_are_not_of_this_job_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, ROWS)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match='another job: method is "original" there and "other" here; text is anoth'):
        check_result_file(path, {"method": "other", "text": "f" * 32})
    with (
        pytest.raises(RunFolderError, match="another job: method"),
        open_results(path, {**JOB, "method": "other"}, COLUMNS, {}),
    ):
        pass
    check_result_file(path, {"method": "original"})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_users_own_file_a_changed_one_and_one_in_use_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("mine\n")
    with pytest.raises(RunFolderError, match="exists already, and is nothing that can be gone on with"):
        check_result_file(own, JOB)
    path = tmp_path / "results.csv"
    write(path, ROWS)
    with (
        open_results(path, JOB, COLUMNS, {}),
        pytest.raises(RunFolderError, match="being written by another process"),
        open_results(path, JOB, COLUMNS, {}),
    ):
        pass
    path.write_bytes(path.read_bytes().replace(b"-0.1", b"-0.2"))
    with pytest.raises(RunFolderError, match="was changed since"), open_results(path, JOB, COLUMNS, {}):
        pass
    assert own.read_text() == "mine\n"


def test_an_unknown_ending_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"ending \.xlsx: give one of \.csv, \.tsv, \.jsonl"):
        check_result_file(tmp_path / "a.xlsx", JOB)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(RunFolderError, match="is a folder"):
        check_result_file(tmp_path / "folder.csv", JOB)
