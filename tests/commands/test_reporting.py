"""Where figures go beside metrics.jsonl; TensorBoard's files are read by TensorBoard itself."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from peft_mlm.argument_fields import argument_fields
from peft_mlm.errors import ArgumentsError
from peft_mlm.reporting import REPORTERS, SECRET, asked_reporters, check_reporters, reports_in
from peft_mlm.run_folder import RunFolder
from tests.commands.conftest import Answer, train

MISSING = [
    name
    for name, row in REPORTERS.items()
    if row.modules and not any(importlib.util.find_spec(module.split(".")[0]) for module in row.modules)
]


def test_the_places_are_those_of_transformers() -> None:
    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []), ("none", []), ([], []), (["none"], []), ("tensorboard", ["tensorboard"]),
        (["tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)  # fmt: skip
def test_what_is_asked_for(given: Any, names: list[str]) -> None:
    assert asked_reporters({"report_to": given}) == names


def test_all_are_those_that_are_installed() -> None:
    assert set(asked_reporters({"report_to": "all"})) == set(REPORTERS) - set(MISSING) - {"kubeflow"}
    check_reporters(asked_reporters({"report_to": ["all"]}))


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        check_reporters([name])
    assert str(caught.value) == f"report_to {name} needs the package {REPORTERS[name].package}: pip install " + (
        REPORTERS[name].package
    )


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases itself leaves a folder `wandb` where a run was started."""
    (tmp_path / "swanlab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentsError, match="pip install swanlab"):
        check_reporters(["swanlab"])


def test_all_faults_are_told_before_the_model_is_looked_for(command: Callable[..., Answer], tmp_path: Path) -> None:
    words = ["train", "--model_name_or_path", tmp_path / "none", "--train_file", tmp_path / "none.txt", "--use_lora"]
    answer = command(*words, "--output_dir", tmp_path / "run", "--report_to", "nowhere,swanlab")
    assert (answer.code, answer.out) == (2, "")
    assert "'nowhere' is no place to report to. There are: all, none, azure_ml" in answer.err
    assert "pip install swanlab" in answer.err
    assert list(tmp_path.iterdir()) == []


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_what_metrics_jsonl_gets_into_the_run_folder(
    base_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = train(base_folder, text_file, text_file, tmp_path / "run", report_to="tensorboard", max_steps=6, eval_steps=3)
    (events,) = (run / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6"}
    assert "WANDB_DIR" not in os.environ
    shown = scalars(run / "tensorboard")
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in record.items():
            if key in ("step", "epoch"):
                continue
            tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
            assert shown[tag][record["step"]] == pytest.approx(value, rel=1e-6), tag
    assert {"train/loss", "eval/loss", "eval/accuracy", "eval/perplexity", "train/tokens_per_second"} <= set(shown)
    for file in (run / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_tensorboard_writes_where_its_user_says(
    base_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    run = train(base_folder, text_file, text_file, tmp_path / "run", report_to="tensorboard", max_steps=2, eval_steps=2)
    assert scalars(tmp_path / "boards")["eval/loss"]
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--token", "hf_secret", "--max_steps", "3"], ["train", "--token", "***", "--max_steps", "3"]),
        (["train", "--hub_token=hf_secret", "--use_lora"], ["train", "--hub_token=***", "--use_lora"]),
        (["--tokenizer_name", "hf_x", "a=b", "--token"], ["--tokenizer_name", "hf_x", "a=b", "--token"]),
        ([], []),
    ],
)
def test_who_notes_the_command_line_gets_no_token(
    words: list[str], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    before = words[:]
    with reports_in(RunFolder(tmp_path / "run"), []):
        assert sys.argv == told
        assert os.environ["WANDB_DIR"] == str(tmp_path / "run")
    assert sys.argv == before
    assert "WANDB_DIR" not in os.environ


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    with reports_in(RunFolder(tmp_path), []):
        assert os.environ["WANDB_DIR"] == "/elsewhere"
    assert os.environ["WANDB_DIR"] == "/elsewhere"


def test_every_secret_argument_is_known() -> None:
    secret = {f"--{name}" for name in argument_fields() if name.split("_")[-1] == "token"}
    assert secret == set(SECRET)
