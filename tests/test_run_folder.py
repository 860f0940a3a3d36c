from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from peft_mlm.errors import RunFolderError
from peft_mlm.run_folder import (
    RunFolder,
    append_jsonl,
    check_output_dir,
    cut_metrics,
    describe_environment,
    find_checkpoint,
    is_run_folder,
    read_json,
    staged,
    write_json,
)


def make_run(path: Path, steps: tuple[int, ...] = ()) -> RunFolder:
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.arguments.write_text("{}")
    write_json(run.summary, {"status": "running"})
    for step in steps:
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        write_json(run.checkpoints / f"checkpoint-{step}" / "trainer_state.json", {"global_step": step})
    return run


def test_a_new_or_empty_folder_may_be_written_and_checking_writes_nothing(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "a" / "b", resume=False)
    check_output_dir(tmp_path, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_the_user_had_is_in_danger(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        check_output_dir(tmp_path, resume=False)
    with pytest.raises(RunFolderError, match="is a file"):
        check_output_dir(tmp_path / "thesis.txt", resume=False)
    with pytest.raises(RunFolderError, match="cannot be made"):
        check_output_dir(tmp_path / "thesis.txt" / "run", resume=False)
    with pytest.raises(RunFolderError, match="no run in"):
        check_output_dir(tmp_path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_newest_complete_checkpoint_is_resumed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(9, 20, 100))
    (run.checkpoints / "checkpoint-200").mkdir()  # killed while it was written
    check_output_dir(run.path, resume=True)
    assert is_run_folder(run.path)
    assert find_checkpoint(run, "true").name == "checkpoint-100"
    assert find_checkpoint(run, str(run.checkpoints / "checkpoint-9")).name == "checkpoint-9"
    with pytest.raises(RunFolderError, match="no checkpoint: it has no trainer_state"):
        find_checkpoint(run, str(run.checkpoints / "checkpoint-200"))
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        find_checkpoint(make_run(tmp_path / "other"), "true")


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    def write(fail: bool) -> None:
        with staged(tmp_path / "adapter") as folder:
            (folder / "one").write_text("1")
            if fail:
                raise CrashError
            (folder / "two").write_text("2")

    with pytest.raises(CrashError):
        write(fail=True)
    assert list(tmp_path.iterdir()) == []
    write(fail=False)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["one", "two"]
    with pytest.raises(CrashError):
        write(fail=True)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["one", "two"]
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("when", ["gone", "held"])
def test_a_folder_that_is_taken_for_a_leftover_before_it_is_held_is_made_anew(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def taken(**options: Any) -> str:
        folder = make(**options)
        made.append(folder)
        if len(made) == 1 and when == "gone":
            Path(folder).rmdir()
        if len(made) == 1 and when == "held":
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with staged(tmp_path / "adapter") as folder:
        (folder / "one").write_text("1")
    assert len(made) == 2
    assert (tmp_path / "adapter" / "one").read_text() == "1"


def test_json_files_are_json_even_where_a_figure_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": "é"})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
        "e": "é",
    }
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"x\.json cannot be read"):
        read_json(tmp_path / "x.json")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    for step in (1, 2, 4, 3, 9):
        append_jsonl(path, {"step": step, "loss": 1.0})
    cut_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_environment_tells_versions_and_no_user_or_path() -> None:
    import getpass
    import socket

    told = describe_environment("cpu")
    assert told["versions"]["torch"]
    text = json.dumps(told)
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text
