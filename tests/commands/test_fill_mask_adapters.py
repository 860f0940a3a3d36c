"""`fill-mask` with several adapters: the base and each of them, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import peft_mlm
from tests.commands.conftest import Answer, train

TEXT = "ABC<mask>EF"


@pytest.fixture(scope="module")
def second_run(base_folder: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "second"
    return train(base_folder, text_file, held_out, folder, lora_r=2, seed=3, max_steps=10, do_eval=False)


def test_each_adapter_says_what_it_says_alone(
    command: Callable[..., Answer], trained_run: Path, second_run: Path, base_folder: Path
) -> None:
    words = [
        base_folder,
        TEXT,
        "A<mask>",
        "--adapter",
        f"one={trained_run}",
        "--adapter",
        f"two={second_run / 'adapter'}",
    ]
    record = command("fill-mask", *words, "--json").record
    texts = [TEXT, "A<mask>"]
    assert record["results"] == peft_mlm.fill_mask(str(base_folder), texts)
    assert record["adapters"] == {
        "one": peft_mlm.fill_mask(str(trained_run), texts),
        "two": peft_mlm.fill_mask(str(second_run), texts),
    }
    shown = command("fill-mask", *words)
    assert shown.code == 0
    header = next(line for line in shown.out.splitlines() if "base" in line)
    assert header.split() == ["base", "one", "two"]
    best = record["adapters"]["one"][0]["masks"][0]["predictions"][0]
    assert f"{best['token']} {best['probability']:.4f}" in shown.out


def test_without_names_they_are_named_after_their_folders(
    command: Callable[..., Answer], trained_run: Path, second_run: Path, base_folder: Path
) -> None:
    words = [base_folder, TEXT, "--adapter", trained_run, "--adapter", second_run / "adapter"]
    assert list(command("fill-mask", *words, "--json").record["adapters"]) == [trained_run.name, "second"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--use_base"], "--use_base does not go with --adapter"),
        (["--load_in_4bit"], "--load_in_4bit does not go with --adapter"),
        (["--adapter", "one=nowhere"], "name of its own"),
        (["--top_k", "0"], "top_k is 0"),
    ],
)
def test_mistakes_end_in_one_sentence(
    command: Callable[..., Answer], trained_run: Path, base_folder: Path, flags: list[str], why: str
) -> None:
    assert why in command("fill-mask", base_folder, TEXT, "--adapter", f"one={trained_run}", *flags).fault


def test_a_run_is_no_base(command: Callable[..., Answer], trained_run: Path) -> None:
    fault = command("fill-mask", trained_run, TEXT, "--adapter", f"one={trained_run}").fault
    assert "is no base model but a run" in fault
