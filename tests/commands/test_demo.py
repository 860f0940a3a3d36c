from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm.commands.demo import SHIPPED
from peft_mlm.config import read_arguments
from tests.commands.conftest import Answer

KEYS = {
    "base", "adapted", "human", "adapter_bytes", "trainable_parameters", "total_parameters", "merge", "fill_mask",
    "run_folder", "merged_folder", "seconds",
}  # fmt: skip
FIGURES = {"perplexity", "accuracy"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder far from the checkout."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """The real command, shortened, in a process of its own that can reach no hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(place / "hf_home")}
    words = [sys.executable, "-m", "peft_mlm", "demo", "--max_steps", "40", "--eval_steps", "20", "--json"]
    process = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "127.0.0.1" not in process.stderr
    (line,) = process.stdout.splitlines()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(record, dict)
    return record


def test_it_gives_what_its_help_promises(done: dict[str, Any], place: Path) -> None:
    assert set(done) == KEYS
    for part in (done["base"], done["adapted"], done["human"]["base"], done["human"]["adapted"]):
        assert set(part) == FIGURES
    assert (done["run_folder"], done["merged_folder"]) == ("runs/demo", "runs/demo/merged")
    adapter = place / "runs" / "demo" / "adapter" / "adapter_model.safetensors"
    assert done["adapter_bytes"] == adapter.stat().st_size < 300_000
    assert done["trainable_parameters"] < done["total_parameters"] / 10
    assert done["seconds"] > 0


def test_the_adapter_learns_mouse_and_the_base_is_the_published_model(done: dict[str, Any]) -> None:
    assert done["base"]["accuracy"] == pytest.approx(0.68, abs=0.03)
    assert done["human"]["base"]["accuracy"] == pytest.approx(0.95, abs=0.02)
    assert done["adapted"]["accuracy"] > done["base"]["accuracy"] + 0.07
    assert done["adapted"]["perplexity"] < done["base"]["perplexity"] * 0.75
    assert done["human"]["adapted"] != done["human"]["base"]


def test_the_merge_is_exact_and_the_merged_folder_is_a_plain_model(done: dict[str, Any], place: Path) -> None:
    assert done["merge"]["max_abs_logit_diff"] < 1e-5
    assert done["merge"]["top1_agreement"] == 1
    assert done["merge"]["tied"] is True
    _, loading = AutoModelForMaskedLM.from_pretrained(place / done["merged_folder"], output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_a_residue_of_a_held_out_sequence_is_filled(done: dict[str, Any], place: Path) -> None:
    shown = done["fill_mask"]
    whole = shown["sequence"].replace("<mask>", shown["residue"])
    records = SHIPPED["validation_file"].read_text().split(">")[1:]
    assert whole == "".join(records[0].splitlines()[1:])
    for part, target in (("base", done["run_folder"]), ("merged", done["merged_folder"])):
        (result,) = peft_mlm.fill_mask(str(place / target), shown["sequence"], use_base=part == "base")
        assert [p["token"] for p in shown[part]] == [p["token"] for p in result["masks"][0]["predictions"]]
    assert shown["base"] != shown["merged"]


def test_its_run_is_an_ordinary_run_that_later_commands_read_from_anywhere(
    done: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = place / done["run_folder"]
    for target in (run, run / "adapter"):
        record = peft_mlm.evaluate(str(target))
        assert {name: record[name] for name in FIGURES} == pytest.approx(done["adapted"], rel=1e-6)
    record = peft_mlm.evaluate(str(run / "merged"))
    assert {name: record[name] for name in FIGURES} == pytest.approx(done["adapted"], rel=1e-5)
    arguments = read_arguments(run / "arguments.yaml")
    assert arguments.training["max_steps"] == 40
    assert arguments.training["learning_rate"] == 3e-3  # from configs/demo.yaml


@pytest.mark.usefixtures("done")
def test_the_next_demo_takes_the_next_folder_and_shows_a_table(
    place: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in (place / "runs" / "demo").rglob("*")}
    answer = command("demo", "--max_steps", 1, "--max_eval_samples", 8)
    assert answer.code == 0
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["demo", "demo-2"]
    assert {path: path.stat().st_mtime_ns for path in (place / "runs" / "demo").rglob("*")} == before
    summary = json.loads((place / "runs" / "demo-2" / "summary.json").read_text())
    for part in ("base", "adapted"):
        assert f"{summary[part]['perplexity']:.4g}" in answer.out
    for shown in ("mouse, unseen genes", "human", "masked residue 38 (it is K)", "runs/demo-2"):
        assert shown in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/here"], "'runs/here'"),
        (["--output_dir"], "--output_dir"),
        (["--max_step", 10], "max_steps"),
        (["--max_steps", "many"], "many"),
        (["--max_steps", 10, "runs/here"], "runs/here"),
        (["--output_dir", "full"], "not empty"),
        (["--lora_target_modules", "qury"], "qury"),
        (["--train_file", "nothing.fasta"], "--train_file: the demo brings"),
        (["--model_name_or_path=org/model", "--max_steps", 10], "--model_name_or_path: the demo brings"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    words: list[object], said: str, tmp_path: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert said in command("demo", *words).fault
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"full", "full/mine.txt"}
