"""A command run in this process, and the run that the commands are tried on."""

from __future__ import annotations

import json
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm.cli import main
from peft_mlm.console import CHATTY
from tests.tiny import save_base, save_encoder, save_texts


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON object on stdout; NaN and Infinity, which are no JSON, are refused."""
        (line,) = self.out.splitlines()
        record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert isinstance(record, dict)
        return record

    @property
    def fault(self) -> str:
        """The one message of a user's mistake; there is nothing else."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("peft-mlm: error: ")
        return lines[0].removeprefix("peft-mlm: error: ")


@pytest.fixture(autouse=True)
def _own_process_settings() -> Iterator[None]:
    """Undo what the command line sets for its process: loggers, environment, signals, warnings."""
    loggers = [logging.getLogger(name) for name in ("peft_mlm", *CHATTY)]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    environment, on_stop = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, on_stop)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command as the shell would, and give what it leaves."""

    def run(*words: object) -> Answer:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[None]:
    """See to it that a test's commands write nothing into its folder, and lose nothing there."""

    def files() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    before = files()
    yield
    assert files() == before


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that no run is trained on."""
    return save_texts(tmp_path_factory.mktemp("held_out") / "held_out.txt", 60, seed=9)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a masked LM head."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shapes as the base, with other weights."""
    return save_base(tmp_path_factory.mktemp("other_base"), seed=5)


def train(base: Path, text: Path, held_out: Path, output_dir: Path, **changes: Any) -> Path:
    """Train 30 steps, one row per text; a checkpoint at 15 and at 30."""
    arguments = {
        "model_name_or_path": base,
        "train_file": text,
        "validation_file": held_out,
        "output_dir": output_dir,
        "use_lora": True,
        "rows": "line",
        "max_steps": 30,
        "eval_steps": 15,
        "learning_rate": 1e-2,
        **changes,
    }
    return peft_mlm.train(arguments).run_folder


@pytest.fixture(scope="session")
def trained_run(base_folder: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter; tests read it and write nothing into it."""
    return train(base_folder, text_file, held_out, tmp_path_factory.mktemp("runs") / "adapter_run")


@pytest.fixture(scope="session")
def full_run(base_folder: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained the whole model."""
    folder = tmp_path_factory.mktemp("runs") / "full_run"
    return train(base_folder, text_file, held_out, folder, use_lora=False, learning_rate=1e-3)
