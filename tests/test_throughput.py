from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState

from peft_mlm.machine import peak_memory
from peft_mlm.throughput import Reading, Throughput
from peft_mlm.training_arguments import build_training_arguments
from tests.test_trainer import adapted, letter_rows, make_trainer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_of_evaluations_and_of_saving_is_left_out(tmp_path: Path) -> None:
    clock = Clock()
    throughput = Throughput(clock)
    events = (build_training_arguments({"use_cpu": True}, tmp_path), TrainerState(), TrainerControl())
    throughput.on_train_begin(*events)
    story: list[tuple[float, str]] = [
        (50.0, "on_step_begin"),  # what went before is no step
        (52.0, "on_step_end"),
        (60.0, "on_evaluate"),
        (61.0, "on_save"),
        (61.5, "on_step_begin"),
        (64.0, "on_step_end"),  # half a second of it loaded the batch
    ]
    for clock.now, event in story:
        if event == "on_step_begin":
            throughput.count(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
        getattr(throughput, event)(*events)
    clock.now = 65.0  # a GPU was waited for
    reading = throughput.read(Accelerator(cpu=True))
    assert (reading.tokens, reading.seconds) == (8, 2.0 + 4.0)
    assert reading.describe() == {"tokens_per_second": 1.3, "peak_memory_bytes": reading.peak_memory}
    assert throughput.seconds_left(10, 0) == 10 * 6.0 / 2
    throughput.evaluation_seconds = 7.0
    assert throughput.seconds_left(10, 2) == 10 * 6.0 / 2 + 2 * 7.0
    again = throughput.read(Accelerator(cpu=True))
    assert (again.tokens, again.seconds) == (0, 0.0)
    assert again.describe()["tokens_per_second"] == 0


def test_nothing_is_foreseen_before_the_first_step() -> None:
    assert Throughput().seconds_left(10, 2) is None


@pytest.mark.parametrize("accumulated", [1, 3])
def test_logs_count_every_token_but_padding_once(accumulated: int, tmp_path: Path, monkeypatch: Any) -> None:
    rows = letter_rows(36)  # 18 steps, or 6: every step is in a log
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated, "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, adapted(), rows, logging_steps=3, eval_strategy="steps", eval_steps=3, **settings)
    readings: list[Reading] = []
    read = trainer.throughput.read
    monkeypatch.setattr(trainer.throughput, "read", lambda *given: readings.append(read(*given)) or readings[-1])
    trainer.train()
    assert sum(reading.tokens for reading in readings) == 2 * sum(len(ids) for ids in rows["input_ids"])
    records = [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
    new = {"tokens_per_second", "peak_memory_bytes"}
    for record in records:
        assert new & set(record) == (new if "loss" in record else set()), record
    of_logs = [record for record in records if "loss" in record]
    assert [record["tokens_per_second"] for record in of_logs] == [
        round(reading.tokens / reading.seconds, 1) for reading in readings
    ]
    assert 0 < of_logs[0]["peak_memory_bytes"] <= of_logs[-1]["peak_memory_bytes"] <= peak_memory()


def test_the_peak_is_that_of_this_process_alone() -> None:
    """A small process that a large one starts is small."""
    held = torch.ones(2**27)  # half a gigabyte
    assert peak_memory() >= held.numel() * 4
    assert peak_memory() >= psutil.Process().memory_info().rss * 0.9
    script = "from peft_mlm.machine import peak_memory; print(peak_memory())"
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert 5e6 < int(done.stdout) < 1e8
