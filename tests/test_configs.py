from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from peft_mlm.cli import COMMANDS
from peft_mlm.config import read_arguments

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").iterdir())
HEADER = ("Needs", "Expected", "Command")


def header(config: Path) -> str:
    """The comment that a config begins with."""
    lines = config.read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in comment)


def test_there_are_configs() -> None:
    assert "demo.yaml" in [config.name for config in CONFIGS]
    assert {config.suffix for config in CONFIGS} == {".yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_reads_without_fault_or_notice_and_sets_what_it_names(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = read_arguments(config)
    assert arguments.notices == []
    named = re.findall(r"^(\w+):", config.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(named)) == len(named)
    assert {name: arguments.sources[name] for name in named} == dict.fromkeys(named, f"file {config.name}")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_says_what_it_is_for_needs_gives_and_how_it_is_run(config: Path) -> None:
    first, *rest = header(config).splitlines()
    assert first.endswith(".")
    for name in HEADER:
        assert any(re.match(rf"{name}: +\S", line) for line in rest), name
    commands = re.findall(r"peft-mlm .*?(?=  |$)", "\n".join(rest), re.MULTILINE)
    words = [shlex.split(command) for command in commands]
    assert [f"configs/{config.name}"] in [line[2:3] for line in words if line[1] == "train"]
    assert {line[1] for line in words} <= set(COMMANDS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_names_files_of_the_checkout_and_writes_into_runs(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = read_arguments(config)
    assert Path(arguments.training["output_dir"]).parts[0] == "runs"
    for file in [*(arguments.data.train_file or []), *(arguments.data.validation_file or [])]:
        assert not Path(file).is_absolute()
        assert Path(file).is_file() or not file.startswith("peft_mlm/"), file
