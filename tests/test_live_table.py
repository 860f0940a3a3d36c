"""The table while a run trains: on a terminal (a pseudo-terminal of the system), and nowhere else."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from peft_mlm import live_table
from peft_mlm.callbacks import show_progress
from peft_mlm.live_table import COLUMNS, ROWS, LiveTable, clock_text, evaluations_left
from peft_mlm.metrics import MaskedScores
from peft_mlm.throughput import Reading, Throughput
from tests.test_trainer import adapted, letter_rows, make_trainer

ROOT = Path(__file__).parent.parent
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
RUN = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}


class Terminal:
    """A pseudo-terminal, and all that is written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        self.stream: TextIO = os.fdopen(os.dup(self.slave), "w", buffering=1)
        self._read = bytearray()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._master, 65536):
                self._read += data

    @property
    def text(self) -> str:
        return self._read.decode(errors="replace")

    def attach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it this process's stderr; in the test itself, as pytest sets stderr anew before each phase."""
        monkeypatch.setattr(sys, "stderr", self.stream)

    def close(self) -> str:
        self.stream.close()
        os.close(self.slave)
        self._thread.join(timeout=20)
        return self.text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_shows_the_table(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.attach(monkeypatch)
    monkeypatch.setattr(live_table, "SECONDS", 0.0)
    trainer = make_trainer(tmp_path, adapted(), letter_rows(32), **RUN)
    trainer.live_table.base = trainer.measure(trainer.eval_dataset, label="base model")
    trainer.train()
    assert sys.stderr is terminal.stream
    written = terminal.close()
    assert written.count(HIDDEN) == written.count(SHOWN) == 1
    assert written.rindex(SHOWN) > written.rindex(HIDDEN)
    shown = plain(written)
    words = ("learning", "masked", "accuracy", "tokens/s", "memory", "4 of 4 steps", "left", "evaluating, batch 1 of")
    for word in words:
        assert word in shown, word
    # The last drawing holds what metrics.jsonl holds.
    records = [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
    last = shown[shown.rindex("learning") :]
    for record in records:
        if "loss" in record:
            assert f"{record['loss']:.4f}" in last
            assert f"{record['tokens_per_second']:,.0f}" in last
        if "eval_accuracy" in record:
            assert f"{record['eval_accuracy']:.4f}" in last
    assert f"(base {trainer.live_table.base.perplexity:.4g})" in last
    # The lines of evaluations are those of a pipe, above the table.
    lines = re.findall(r"step +\d/4  loss \d+\.\d{4}  perplexity \d+\.\d{3}  masked accuracy \d\.\d{4}", shown)
    assert len(lines) == 2


@pytest.mark.parametrize("where", ["pipe", "disable_tqdm", "dumb"])
def test_elsewhere_there_are_the_lines_of_evaluations_alone(
    where: str, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.attach(monkeypatch)
    if where == "pipe":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    if where == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    trainer = make_trainer(tmp_path, adapted(), letter_rows(32), disable_tqdm=where == "disable_tqdm", **RUN)
    trainer.train()
    written = sys.stderr.getvalue() if isinstance(sys.stderr, io.StringIO) else terminal.close()
    lines = written.replace("\r", "\n").splitlines()
    if where == "dumb":  # bars of evaluations go to and fro on one line
        lines = [line for line in lines if not line.strip().startswith("evaluating")]
    assert "\x1b" not in written
    assert [line[:14] for line in lines if line.strip()] == ["step      2/4 ", "step      4/4 "]


def test_the_table_changes_no_figure(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(folder: Path) -> list[dict[str, Any]]:
        trainer = make_trainer(folder, adapted(), letter_rows(32), **RUN)
        trainer.train()
        lines = [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if "second" not in k and "runtime" not in k and "memory" not in k}
            for line in lines
        ]

    terminal.attach(monkeypatch)
    with_table = figures(tmp_path / "one")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert figures(tmp_path / "two") == with_table
    assert "tokens/s" in terminal.close()


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, RuntimeError])
def test_what_is_said_meanwhile_stands_above_and_the_terminal_is_left_as_it_was(
    ending: type[BaseException] | None, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.attach(monkeypatch)
    logger = logging.getLogger("test_live_table")
    logger.propagate = False
    handler = logging.StreamHandler(terminal.stream)
    logger.handlers = [handler]
    table = LiveTable(Throughput())
    stdout = sys.stdout
    said = contextlib.nullcontext() if ending is None else pytest.raises(ending)
    with said, table:
        assert table.is_shown
        logger.warning("a notice [of] a logger")
        print("a line", file=sys.stderr)
        assert sys.stdout is stdout  # no terminal: what is printed there is a result
        if ending is not None:
            raise ending
    assert (sys.stderr, sys.stdout, handler.stream) == (terminal.stream, stdout, terminal.stream)
    assert not table.is_shown
    written = terminal.close()
    assert written.rindex(SHOWN) > written.rindex(HIDDEN)
    for text in ("a notice [of] a logger", "a line"):
        (line,) = [line for line in plain(written).splitlines() if text in line]
        assert "steps" not in line


def filled_table(count: int) -> LiveTable:
    table = LiveTable(Throughput())
    table.base = MaskedScores(np.array([[300.0, 10, 20, 100]]))
    table.throughput.last = Reading(123_456, 1.0, 12_340_000_000)
    table.throughput.steps, table.throughput.step_seconds = 10, 100.0
    state, control = TrainerState(max_steps=123_456, global_step=0), TrainerControl()
    for step in range(1, count + 1):
        state.global_step = step * 1000
        logs = {"loss": 1.25, "learning_rate": 3e-4, "tokens_per_second": 123456.7, "peak_memory_bytes": 12_340_000_000}
        table.on_log(None, state, control, logs=logs)
        table.on_log(None, state, control, logs={"eval_loss": 1.0, "eval_perplexity": 2.718, "eval_accuracy": 0.625})
    table.step, table.max_steps = state.global_step, state.max_steps
    return table


def drawn(table: LiveTable, width: int, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table.render(console))
    return [line.rstrip() for line in plain(capture.get()).splitlines()]


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (200, {column.name for column in COLUMNS}),
        (80, {column.name for column in COLUMNS}),
        (60, {"step", "loss", "learning\nrate", "masked\naccuracy", "tokens/s"}),
        (40, {"step", "loss", "masked\naccuracy"}),
        (20, {"step", "loss"}),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_no_wider_line(width: int, kept: set[str]) -> None:
    lines = drawn(filled_table(20), width)
    assert max(len(line) for line in lines) <= width
    rows = [line for line in lines if re.match(r" +\d+,000 +1\.2500", line)]
    assert len(rows) == ROWS
    assert rows[-1].split()[0] == "20,000"
    head = " ".join(lines[: lines.index(rows[0])])
    for column in COLUMNS:
        assert all((word in head) == (column.name in kept) for word in column.name.split() if word != "rate"), column
    text = " ".join(" ".join(lines).split())
    for part in ("123,456 tokens/s", "12.3 GB", "perplexity 2.718 (base 20.09)", "masked accuracy 0.625 (base 0.1)"):
        assert part in text, part


@pytest.mark.parametrize("height", [5, 12, 20])
def test_a_low_terminal_gets_fewer_rows(height: int) -> None:
    lines = drawn(filled_table(20), 100, height)
    assert len([line for line in lines if "1.2500" in line]) == max(1, min(ROWS, height - 10))
    if height >= 12:
        assert len(lines) < height


def test_an_empty_table_is_drawn_too() -> None:
    assert "0 of 0 steps" in " ".join(drawn(LiveTable(Throughput()), 80))


def test_only_the_first_process_shows_anything(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.attach(monkeypatch)
    arguments = [SimpleNamespace(process_index=index, disable_tqdm=off) for index in (0, 1) for off in (False, True)]
    assert [show_progress(one) for one in arguments] == [True, False, False, False]


@pytest.mark.parametrize(
    ("strategy", "step", "left"), [("steps", 1, 4), ("steps", 5, 4), ("steps", 6, 3), ("steps", 20, 1), ("no", 3, 0)]
)
def test_the_evaluations_that_are_left_are_counted(strategy: str, step: int, left: int) -> None:
    state = TrainerState(global_step=step, max_steps=20, eval_steps=5, num_train_epochs=3, epoch=0.5)
    assert evaluations_left(SimpleNamespace(eval_strategy=strategy), state) == left
    assert evaluations_left(SimpleNamespace(eval_strategy="epoch"), state) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (7265, "2:01:05"), (86400, "1 day, 0:00:00"), (3 * 86400 + 7265, "3 days, 2:01:05")],
)
def test_times_are_said(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.fixture
def started(
    base_folder: Path, text_file: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Terminal]]]:
    running: list[subprocess.Popen[str]] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background jobs ignore it

    def start(*words: str) -> tuple[subprocess.Popen[str], Terminal]:
        terminal = Terminal()
        command = [sys.executable, "-m", "peft_mlm", "train", "--model_name_or_path", str(base_folder), "--use_lora"]
        command += [
            "--train_file",
            str(text_file),
            "--output_dir",
            str(tmp_path / "run"),
            "--use_cpu",
            "--json",
            *words,
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal.slave,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        )
        running.append(process)
        return process, terminal

    yield start
    for process in running:
        process.kill()


def test_a_run_that_is_stopped_leaves_the_terminal_and_the_result_clean(
    started: Callable[..., tuple[subprocess.Popen[str], Terminal]],
) -> None:
    process, terminal = started(
        "--max_steps", "100000", "--eval_steps", "50", "--logging_steps", "5", "--save_steps", "50"
    )
    until = time.monotonic() + 120
    while "step     50/100000" not in terminal.text and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    written = terminal.close()
    assert (process.returncode, out) == (130, ""), written[-2000:]
    assert written.rindex(SHOWN) > written.rindex(HIDDEN)
    after = plain(written[written.rindex(SHOWN) :])
    assert "peft-mlm: interrupted; go on with: peft-mlm train" in after
    assert "Traceback" not in written
    assert "tokens/s" in plain(written)
