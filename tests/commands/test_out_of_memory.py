"""Runs whose memory is too small for a step: one message, or the batch that fits; the steps stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.roberta.modeling_roberta import RobertaEncoder

import peft_mlm
from peft_mlm.errors import ArgumentsError
from peft_mlm.out_of_memory import is_out_of_memory, smaller_batch
from tests.commands.conftest import Answer

# As CUDA's allocator says it.
FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.76 GiB of which none is free."


@pytest.fixture
def tokens_that_fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the encoder of a model in training raise what CUDA raises where a batch has more tokens than these."""
    plain = RobertaEncoder.forward

    def limit(tokens: int, *, after: int = 0) -> None:
        calls = [0]

        def forward(self: Any, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
            calls[0] += self.training
            if self.training and calls[0] > after and hidden.shape[0] * hidden.shape[1] > tokens:
                raise torch.OutOfMemoryError(FULL)
            return plain(self, hidden, *args, **options)

        monkeypatch.setattr(RobertaEncoder, "forward", forward)

    return limit


def arguments(base: Path, text: Path, held_out: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": base, "train_file": text, "validation_file": held_out, "output_dir": output_dir,
        "use_lora": True, "max_seq_length": 16, "max_steps": 6, "eval_steps": 3, "logging_steps": 1, "use_cpu": True,
        "learning_rate": 1e-2, **changes,
    }  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("after", [0, 4], ids=["at the first step", "later"])
def test_the_batch_that_fits_gives_the_run_of_that_batch_with_accumulation(
    after: int, base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, tokens_that_fit: Any, caplog: Any
) -> None:
    given = (base_folder, text_file, held_out)
    plain = arguments(*given, tmp_path / "plain", per_device_train_batch_size=3, gradient_accumulation_steps=4)
    expected = peft_mlm.train(plain).run_folder
    tokens_that_fit(3 * 16, after=after)
    caplog.set_level("INFO", "peft_mlm")
    searching = arguments(
        *given,
        tmp_path / "found",
        per_device_train_batch_size=12,
        auto_find_batch_size=True,
        gradient_accumulation_steps=1,
    )
    run = peft_mlm.train(searching).run_folder
    assert "batches of 3 rows, 4 to a step" in caplog.text
    assert losses(run) == losses(expected)
    assert all(torch.equal(tensor, adapter(run)[name]) for name, tensor in adapter(expected).items())


def test_a_batch_in_tokens_is_halved(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, tokens_that_fit: Any, caplog: Any
) -> None:
    tokens_that_fit(100)
    caplog.set_level("INFO", "peft_mlm")
    given = arguments(base_folder, text_file, held_out, tmp_path / "run", max_tokens_per_batch=320, max_seq_length=60)
    peft_mlm.train({**given, "rows": "line", "auto_find_batch_size": True})
    assert "batches of 80 tokens, 4 to a step" in caplog.text


def test_a_resumed_run_goes_on_with_the_batch_that_fitted(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, tokens_that_fit: Any
) -> None:
    given = (base_folder, text_file, held_out)
    tokens_that_fit(4 * 16)
    searching = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    whole = peft_mlm.train(arguments(*given, tmp_path / "whole", **searching)).run_folder
    part = arguments(*given, tmp_path / "part", **searching)
    run = peft_mlm.train(part).run_folder
    peft_mlm.train({**part, "resume_from_checkpoint": run / "checkpoints" / "checkpoint-3"})
    assert losses(run) == losses(whole)


def test_a_full_memory_is_one_message_and_the_run_can_be_resumed(
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
    tokens_that_fit: Any,
    command: Callable[..., Answer],
) -> None:
    run = tmp_path / "run"
    given = arguments(base_folder, text_file, held_out, run, per_device_train_batch_size=8, eval_steps=2)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    tokens_that_fit(4 * 16, after=4)
    answer = command("train", *words)
    fault = answer.err.splitlines()[-1]
    assert (answer.code, answer.out, "Traceback" in answer.err) == (2, "", False)
    assert fault.startswith("peft-mlm: error: The memory is too small: CUDA out of memory. What takes less: ")
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in fault
    assert all(way in fault for way in ("--auto_find_batch_size", "--activation_checkpointing", "--load_in_4bit"))
    assert fault.endswith(f"peft-mlm train {run / 'arguments.yaml'} --resume_from_checkpoint true")
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    smaller = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    assert command("train", run / "arguments.yaml", "--resume_from_checkpoint", "true", *smaller).code == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_where_one_row_does_not_fit_the_search_ends_with_the_message(
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
    tokens_that_fit: Any,
    command: Callable[..., Answer],
) -> None:
    tokens_that_fit(8)
    given = arguments(base_folder, text_file, held_out, tmp_path / "run", auto_find_batch_size=True, load_in_8bit=False)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    answer = command("train", *words)
    fault = answer.err.splitlines()[-1]
    assert answer.code == 2
    assert fault.startswith("peft-mlm: error: The memory is too small: CUDA out of memory.")
    assert fault.endswith("start again with another --output_dir.")
    assert "batch_size" not in fault.partition("in an evaluation")[0]


def test_a_full_memory_in_an_evaluation_is_one_message(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Answer]
) -> None:
    def forward(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(RobertaEncoder, "forward", forward)
    assert "--per_device_eval_batch_size 4" in command("evaluate", trained_run).fault


def test_other_errors_pass_as_they_are(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **options: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(RobertaEncoder, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        peft_mlm.train(arguments(base_folder, text_file, held_out, tmp_path / "run", auto_find_batch_size=True))


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError(FULL))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ArgumentsError("out of memory"))


@pytest.mark.parametrize(("rows", "expected"), [(1, None), (2, (1, 6)), (7, (1, 21)), (9, (3, 9)), (12, (6, 6))])
def test_a_smaller_batch_divides_the_larger(rows: int, expected: tuple[int, int] | None) -> None:
    assert smaller_batch(rows, 3) == expected
    if expected is not None:
        assert expected[0] * expected[1] == rows * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_batch_that_is_too_large_is_found_out(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A real allocation fails: each row of a batch asks for a tenth of the GPU's memory."""
    plain, tenth = RobertaEncoder.forward, torch.cuda.get_device_properties(0).total_memory // 10

    def forward(self: Any, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.training:
            torch.empty(hidden.shape[0] * tenth, dtype=torch.uint8, device=hidden.device)
        return plain(self, hidden, *args, **options)

    monkeypatch.setattr(RobertaEncoder, "forward", forward)
    caplog.set_level("INFO", "peft_mlm")
    changes = {"per_device_train_batch_size": 12, "auto_find_batch_size": True, "use_cpu": False}
    peft_mlm.train(arguments(base_folder, text_file, held_out, tmp_path / "run", **changes))
    assert "batches of 6 rows, 2 to a step" in caplog.text
