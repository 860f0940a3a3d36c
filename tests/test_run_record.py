"""A run folder becomes one record, whole or not, and without anything that should not leave the machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peft_mlm.config import read_arguments, write_arguments, write_sources
from peft_mlm.errors import DamagedFileError, RunFolderError
from peft_mlm.run_record import figure, number, read_run, read_runs
from tests.run_folders import save_run

WITHOUT_TORCH = """
import sys
from peft_mlm.run_record import read_runs
from peft_mlm.report_page import render_html, render_markdown
runs = read_runs([sys.argv[1]])
render_markdown(runs), render_html(runs)
print([name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules])
"""


def test_logs_and_evaluations_are_parted_and_keep_their_numbers(tmp_path: Path) -> None:
    record = read_run(save_run(tmp_path / "notes"))
    assert record["name"] == "notes"
    assert [log["step"] for log in record["logs"]] == [2, 4, 6, 8]
    assert record["logs"][0] == {"step": 2, "loss": 2.3, "learning_rate": 3e-4, "grad_norm": 1.5}
    assert [sorted(evaluation) for evaluation in record["evaluations"]] == [
        ["accuracy", "loss", "perplexity", "step"]
    ] * 2
    assert record["notices"] == []


def test_a_figure_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    lines = ['{"step": 2, "loss": null, "grad_norm": "<b>"}', '{"step": 4, "loss": 1.0}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(folder)["logs"] == [{"step": 2}, {"step": 4, "loss": 1.0}]


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), -float("inf"), 10**400, [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None
    assert figure({"a": {"b": value}}, "a", "b") is None


def test_numbers_are_found_in_nested_tables() -> None:
    assert figure({"a": {"b": 0}}, "a", "b") == 0
    assert figure({"a": 1.5}, "a") == 1.5
    assert figure({"a": {"b": 1}}, "a", "c") is None
    assert figure({"a": 1}, "a", "b") is None


def test_a_last_line_that_was_cut_off_is_told_and_left_out(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    whole = read_run(folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 10, "lo')
    record = read_run(folder)
    assert record["logs"] == whole["logs"]
    (notice,) = record["notices"]
    assert "last line of metrics.jsonl is cut off" in notice


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}', '{"step": "2"}', "[" * 100_000])
def test_any_other_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(DamagedFileError, match=r"metrics.jsonl is damaged: line 3 is no record of a step") as caught:
        read_run(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "dataset.json", "sources.json", "arguments.yaml"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    (folder / name).write_text("{[")
    with pytest.raises(DamagedFileError, match=f"{name} is damaged"):
        read_run(folder)


def test_only_arguments_and_summary_are_needed(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    for name in ("environment.json", "dataset.json", "sources.json", "metrics.jsonl"):
        (folder / name).unlink()
    record = read_run(folder)
    assert (record["logs"], record["data"], record["given"]) == ([], {}, {})
    (folder / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=r"is no run folder: it does not hold arguments.yaml and summary.json"):
        read_run(folder)


def test_two_folders_of_one_name_are_told_apart_and_one_is_not_read_twice(tmp_path: Path) -> None:
    one, other = save_run(tmp_path / "a" / "notes"), save_run(tmp_path / "b" / "notes")
    assert [record["name"] for record in read_runs([one, other])] == ["notes", "notes (2)"]
    with pytest.raises(RunFolderError, match="is given 2 times"):
        read_runs([one, other.parent.parent / "a" / "notes"])


def test_no_local_path_and_no_token_is_in_a_record(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "xenia" / "notes")
    summary = json.loads((folder / "summary.json").read_text())
    secret = "hf_" + "x" * 32
    summary |= {"status": "failed", "error": f"OSError: no {tmp_path}/xenia/data.txt; token {secret}"}
    (folder / "summary.json").write_text(json.dumps(summary))
    told = json.dumps(read_run(folder))
    assert "data.txt" in told
    assert "letters.txt" in told
    assert str(tmp_path) not in told
    assert "xenia" not in told
    assert secret not in told


def test_the_command_gives_the_arguments_that_were_given(tmp_path: Path) -> None:
    given = {
        "model_name_or_path": "org/model",
        "train_file": ["a b.txt", "c's.txt"],
        "use_lora": True,
        "lora_target_modules": ["query", "value"],
        "lora_r": 4,
        "rank_pattern": {"query": 2},
        "init_lora_weights": "gaussian",
        "learning_rate": 1e-5,
        "seed": 7,
        "validation_split_percentage": 12.5,
        "pad_to_max_length": False,
        "output_dir": "x",
    }
    arguments = read_arguments(values=given)
    folder = save_run(tmp_path / "notes")
    write_arguments(arguments, folder / "arguments.yaml")
    write_sources(arguments, folder / "sources.json")
    command = read_run(folder)["command"]
    program, what, *words = shlex.split(command.replace("\\\n", " "))
    assert (program, what) == ("peft-mlm", "train")
    again = read_arguments(flags=words)
    assert again.training.pop("output_dir") == "runs/notes"
    arguments.training.pop("output_dir")
    for group in ("model", "data", "peft", "training"):
        assert getattr(again, group) == getattr(arguments, group)


def test_paths_stand_in_the_command_with_their_last_parts(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    arguments = yaml.safe_load((folder / "arguments.yaml").read_text())
    assert Path(arguments["train_file"][0]).is_absolute()
    assert " --train_file letters.txt \\\n" in read_run(folder)["command"]


def test_neither_a_record_nor_its_page_needs_a_library_that_computes(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_TORCH, str(save_run(tmp_path / "notes"))]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"
