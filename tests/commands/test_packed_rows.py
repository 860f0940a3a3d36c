"""`--rows packed` from the command line to the figures: the same as each document in a row of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_mlm
from tests.commands.conftest import Answer
from tests.tiny import save_base, save_texts


def words(base: Path, text: Path, held_out: Path, output_dir: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": base,
        "train_file": text,
        "validation_file": held_out,
        "output_dir": output_dir,
        "use_lora": True,
        "rows": "packed",
        "max_steps": 12,
        "eval_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_packed_run_learns_is_resumed_exactly_and_is_measured_as_line_by_line(
    command: Callable[..., Answer], base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = command("train", *words(base_folder, text_file, held_out, run), "--json")
    assert trained.code == 0, trained.err
    assert trained.record["adapted"]["loss"] < trained.record["base"]["loss"]
    facts = json.loads((run / "dataset.json").read_text())
    for split in ("train", "validation"):
        assert facts[split]["documents"] == facts[split]["texts"] > 2 * facts[split]["rows"]
        assert facts[split]["tokens"] == facts[split]["text_tokens"]
        assert 0.9 < facts[split]["fill_rate"] <= 1
        assert facts[split]["cut_texts"] == 0

    packed = command("evaluate", run, "--json").record
    single = command("evaluate", run, "--rows=line", "--json").record
    assert packed["rows"] < single["rows"] == 60
    assert packed["masked_tokens"] == single["masked_tokens"]
    assert packed["loss"] == pytest.approx(single["loss"], rel=1e-6)
    assert packed["accuracy"] == single["accuracy"]
    assert packed["loss"] == pytest.approx(trained.record["adapted"]["loss"], rel=1e-6)

    whole = adapter(run / "adapter")
    arguments, checkpoint = run / "arguments.yaml", run / "checkpoints" / "checkpoint-6"
    resumed = command("train", arguments, f"--resume_from_checkpoint={checkpoint}", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.record["adapter_bytes"] == trained.record["adapter_bytes"]
    for name, weight in adapter(run / "adapter").items():
        assert torch.equal(weight, whole[name]), name


def test_a_model_that_mixes_documents_falls_back_and_says_so(
    command: Callable[..., Answer], text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "mobilebert")
    answer = command("train", *words(base, text_file, held_out, tmp_path / "run", max_steps=2), "--json")
    assert answer.code == 0, answer.err
    assert "transformers has no way to keep them apart in mobilebert models" in " ".join(answer.err.split())
    facts = json.loads((tmp_path / "run" / "dataset.json").read_text())["train"]
    assert facts["rows"] == facts["documents"] == facts["texts"]
    assert facts["fill_rate"] is None
    settings = (tmp_path / "run" / "arguments.yaml").read_text()
    assert "rows: packed" in settings
    assert "train_sampling_strategy: group_by_length" in settings


def test_texts_longer_than_a_row_are_cut_and_told(
    command: Callable[..., Answer], base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    options = words(base_folder, text_file, held_out, tmp_path / "run", max_steps=1, max_seq_length=16)
    answer = command("train", *options, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads((tmp_path / "run" / "dataset.json").read_text())["train"]
    assert facts["cut_texts"] > 0
    assert facts["documents"] > facts["texts"]
    assert facts["tokens"] == facts["text_tokens"]
    assert f"{facts['cut_texts']} texts are longer than max_seq_length 16" in " ".join(answer.err.split())


@pytest.mark.parametrize(
    "changes",
    [
        {"train_sampling_strategy": "random", "remove_unused_columns": True},
        {"max_tokens_per_batch": 124},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "corda"},
        {"pad_to_max_length": True, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 1},
        {"activation_checkpointing": True},
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"bf16": True, "use_cpu": True},
    ],
    ids=lambda changes: "_".join(map(str, changes.values())),
)
def test_whatever_makes_the_batches_keeps_documents_apart(
    changes: dict[str, Any], base_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward pass of training gets positions that start anew within a row."""
    from torch._subclasses.fake_tensor import FakeTensor
    from transformers import RobertaModel

    seen: list[bool] = []
    plain = RobertaModel.forward

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        if any(isinstance(given, FakeTensor) for given in (*args, *kwargs.values())):
            return plain(self, *args, **kwargs)  # the memory is planned on tensors without values
        if self.training or "init_lora_weights" in changes:
            seen.append(positions is not None and int((positions == 2).sum(dim=1).max()) > 1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(RobertaModel, "forward", watch)
    peft_mlm.train(
        {
            "model_name_or_path": str(base_folder),
            "train_file": str(text_file),
            "output_dir": str(tmp_path / "run"),
            "use_lora": True,
            "rows": "packed",
            "max_steps": 2,
            "do_eval": False,
            "per_device_train_batch_size": 4,
            **changes,
        }
    )
    probes = 1 if "init_lora_weights" in changes else 0
    assert sum(seen) >= 2
    assert seen[-2:] == [True, True]
    assert probes == 0 or sum(seen) > 2


def test_contradictions_are_found_at_once(command: Callable[..., Answer]) -> None:
    needed = ("--model_name_or_path=x", "--train_file=y", "--output_dir=z")
    fault = command("train", "--rows=packed", "--line_by_line", *needed).fault
    assert "line_by_line is the same as rows line, but rows is packed" in fault
    fault = command("train", "--rows=pack", *needed).fault
    assert "chunked, packed, line" in fault


def test_texts_that_fill_no_row_are_still_rows(base_folder: Path, tmp_path: Path) -> None:
    text = save_texts(tmp_path / "one.txt", 3, shortest=5, longest=6)
    result = peft_mlm.train(
        {
            "model_name_or_path": str(base_folder),
            "train_file": str(text),
            "output_dir": str(tmp_path / "run"),
            "use_lora": True,
            "rows": "packed",
            "max_steps": 1,
            "do_eval": False,
        }
    )
    assert result.metrics["steps"] == 1
