"""What a command loads before it answers, and what a run does once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm import trainer
from peft_mlm.cli import COMMANDS
from peft_mlm.run_folder import RunFolder
from peft_mlm.trainer import MaskedLMTrainer
from tests.commands.conftest import train

# Runs commands in a fresh interpreter; the last line of stdout tells their exit codes, and which of the modules are
# there afterwards.
PROGRAM = """
import json, sys
from peft_mlm.cli import main
asked, *commands = json.loads(sys.argv[1])
codes = [main(words) for words in commands]
print(json.dumps([codes, [name for name in asked if name in sys.modules]]))
"""
HEAVY = ["torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "pandas", "rich"]


def loaded_after(asked: list[str], *commands: list[str]) -> tuple[list[int], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([asked, *commands])], capture_output=True, text=True, check=True
    )
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    return codes, loaded


def test_help_loads_nothing_heavy() -> None:
    commands = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    assert loaded_after(HEAVY, *commands) == ([0] * len(commands), [])


def test_a_mistake_that_names_and_arguments_tell_is_found_before_anything_heavy_is_loaded(
    base_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ACDEF\n" * 50)
    run = ["--output_dir", str(tmp_path / "run"), "--use_lora"]
    base = ["--model_name_or_path", str(base_folder)]
    adapter = str(RunFolder(trained_run).adapter)
    commands = [
        ["train", "--no_such_argument", "1"],
        ["train", *base, *run, "--train_file", str(text), "--max_steps", "many"],
        ["train", *base, *run, "--train_file", str(tmp_path / "none.txt")],
        ["train", *base, *run, "--train_file", str(text), "--validation_file", str(tmp_path / "*.none")],
        ["train", *run, "--model_name_or_path", str(tmp_path / "none"), "--train_file", str(text)],
        ["evaluate", str(tmp_path / "none"), "--validation_file", str(text)],
        ["evaluate", str(trained_run), "--validation_file", str(tmp_path / "none.txt")],
        ["evaluate", str(base_folder), "--validation_file", str(tmp_path / "none.txt")],
        ["fill-mask", str(tmp_path / "none"), "A<mask>"],
        ["fill-mask", str(base_folder), "A<mask>", "--top_k", "0"],
        ["merge", str(tmp_path / "none"), "--output_dir", str(tmp_path / "merged")],
        ["merge", adapter, "--output_dir", str(tmp_path / "merged"), "--dtype", "int3"],
    ]
    assert loaded_after(HEAVY, *commands) == ([2] * len(commands), [])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_command_without_texts_loads_neither_datasets_nor_the_trainer(trained_run: Path) -> None:
    asked = ["transformers", "datasets", "pandas", "transformers.trainer", "sklearn", "torch.utils.tensorboard"]
    assert loaded_after(asked, ["fill-mask", str(trained_run), "A<mask>"]) == ([0], ["transformers"])


class Counted:
    """Counts the calls of a function that is called all the same."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    functions = {name: Counted(getattr(trainer, name)) for name in ("find_door", "evaluate_masked_lm")}
    for name, function in functions.items():
        monkeypatch.setattr(trainer, name, function)
    return functions


def test_the_head_is_probed_once_and_nothing_is_measured_twice(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, counted: dict[str, Counted]
) -> None:
    run = train(base_folder, text_file, held_out, tmp_path / "run")
    assert counted["find_door"].calls == 1
    assert counted["evaluate_masked_lm"].calls == 3  # the base, and at steps 15 and 30
    summary = json.loads(RunFolder(run).summary.read_text())
    again = peft_mlm.evaluate(str(run))
    assert summary["adapted"] == pytest.approx({name: again[name] for name in summary["adapted"]}, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"eval_steps": 20}, 3),  # the last evaluation is of step 20, of 30
        ({"load_best_model_at_end": True, "learning_rate": 0.3, "metric_for_best_model": "loss"}, 3),
        ({"use_lora": False, "peft_method": "adalora", "learning_rate": 1e-2}, 4),  # ranks are cut after it
    ],
)
def test_figures_are_those_of_the_model_that_is_saved(
    changes: dict[str, Any],
    measured: int,
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
    counted: dict[str, Counted],
) -> None:
    run = train(base_folder, text_file, held_out, tmp_path / "run", **changes)
    assert counted["evaluate_masked_lm"].calls == measured
    summary = json.loads(RunFolder(run).summary.read_text())
    again = peft_mlm.evaluate(str(run))
    assert summary["adapted"] == pytest.approx({name: again[name] for name in summary["adapted"]}, rel=1e-5)


def test_figures_of_one_training_are_not_taken_for_those_of_the_next(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[MaskedLMTrainer] = []
    init = MaskedLMTrainer.__init__

    def keep(self: MaskedLMTrainer, **options: Any) -> None:
        init(self, **options)
        trainers.append(self)

    monkeypatch.setattr(MaskedLMTrainer, "__init__", keep)
    train(base_folder, text_file, held_out, tmp_path / "run")
    (kept,) = trainers
    first = kept.measure_trained(label="")
    kept.args.eval_strategy, kept.args.learning_rate = "no", 0.3
    kept.train()
    second = kept.measure_trained(label="")
    assert second.loss == pytest.approx(kept.measure(kept.eval_dataset, label="").loss)
    assert second.loss != pytest.approx(first.loss)


def test_batches_that_are_not_full_are_left_out_where_asked(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    rows = len([line for line in text_file.read_text().splitlines() if line.strip()])
    steps = {}
    for drop in (False, True):
        run = train(
            base_folder,
            text_file,
            held_out,
            tmp_path / str(drop),
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=7,
            train_sampling_strategy="group_by_length",
            dataloader_drop_last=drop,
        )
        steps[drop] = json.loads(RunFolder(run).summary.read_text())["steps"]
    assert steps == {False: -(-rows // 7), True: rows // 7}
    assert rows % 7
