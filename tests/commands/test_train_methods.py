"""`peft-mlm train --peft_method`: a run from the command line to the merged model, and mistakes found at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Answer


def test_a_run_with_another_method_is_trained_written_repeated_and_merged(
    command: Callable[..., Answer], base_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    words = (
        "train",
        "--model_name_or_path",
        base_folder,
        "--train_file",
        text_file,
        "--rows",
        "line",
        "--max_steps",
        10,
    )
    options = ("--peft_method", "HRA", "--peft_config", '{"r": "4"}', "--learning_rate", "1e-2", "--json")
    record = command(*words, *options, "--output_dir", tmp_path / "run").record
    assert record["method"] == "hra"
    assert record["adapted"]["perplexity"] < record["base"]["perplexity"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("HRA", 4, None)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Method: HRA, r 4;" in card
    assert "- hra\n" in card
    again = command("train", tmp_path / "run" / "arguments.yaml", "--output_dir", tmp_path / "again", "--json").record
    assert again["adapted"] == record["adapted"]
    merged = command("merge", tmp_path / "run", "--output_dir", tmp_path / "merged", "--json").record
    assert merged["max_abs_logit_diff"] < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--peft_method", "vara"), "Nearest: vera"),
        (("--peft_method", "vera", "--peft_config", '{"boft_block_size": 4}'), "It belongs to boft."),
        (("--peft_method", "prompt_tuning"), "outputs and labels no longer lie side by side"),
        (("--peft_method", "unilora", "--load_in_4bit"), "no gradient, no effect"),
        (("--use_lora", "--peft_config", '{"kasa_config": {}}', "--load_in_8bit"), "trains plain LoRA"),
        (("--use_lora", "--lora_rr", "4"), "Nearest: lora_r"),
    ],
)
def test_a_mistake_about_the_method_is_found_before_anything_is_loaded(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    words = [
        "train",
        "--model_name_or_path",
        "no/such",
        "--train_file",
        "none.txt",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    code = (
        "import sys; from peft_mlm.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    (line,) = done.stderr.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
