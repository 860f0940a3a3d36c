from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peft_mlm.adapter import count_parameters
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_memory import describe_memory, weight_bytes
from peft_mlm.config import read_arguments
from peft_mlm.memory import (
    KINDS,
    build_outline,
    evaluation_batch,
    predict,
    step_of,
    training_batch,
)
from peft_mlm.memory_watch import available_bytes, forget_peak, peak_bytes, resident_bytes
from peft_mlm.model import load_base
from peft_mlm.optimizer_memory import optimizer_bytes
from tests.tiny import save_encoder


def planned(folder: Path, **changes: Any) -> Any:
    return read_arguments(values={"model_name_or_path": folder, "use_lora": True, **changes}, planned=True)


@pytest.mark.parametrize(
    "bits",
    [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_the_loaded_base_takes(base_folder: Path, bits: dict[str, bool], dtype: str) -> None:
    real = load_base(ModelArguments(model_name_or_path=str(base_folder), dtype=dtype, **bits)).model  # type: ignore[arg-type]
    outline = build_outline(planned(base_folder, dtype=dtype, **bits))
    truth = describe_memory(real)
    assert outline.weights["quantised"] == truth["quantised"]
    assert outline.weights["embeddings"] == truth["embeddings"]
    assert sum(outline.weights.values()) == truth["total"]
    # Every number of the base, and nothing else, is frozen.
    assert outline.total - outline.trainable == truth["float32"] // 4


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": "lm_head"},
        {"add_tokens": "XYZ,QQQ"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"use_lorafa": True},
        {"use_lora": False, "peft_method": "vera"},
        {"use_lora": False, "peft_method": "ia3"},
        {"use_lora": False, "peft_method": "adalora"},
        {"use_lora": False, "untie_embeddings": True},
    ],
    ids=str,
)
def test_what_is_trained_is_what_the_run_trains(
    base_folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from peft_mlm.preparation import prepare
    from peft_mlm.run_folder import RunFolder

    values = {"train_file": text_file, "output_dir": tmp_path / "run", "rows": "line", "max_steps": 5, **changes}
    arguments = planned(base_folder, **values)
    real = prepare(arguments, RunFolder(tmp_path / "run")).model
    outline = build_outline(arguments)
    assert (outline.trainable, outline.total) == count_parameters(real)
    held = {id(t): t for t in (*real.parameters(), *real.buffers())}.values()
    assert sum(outline.weights.values()) + outline.adapter_bytes == sum(t.numel() * t.element_size() for t in held)


def test_a_fresh_head_is_trained_in_the_outline_too(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    outline = build_outline(planned(tmp_path / "encoder"))
    trained = [name for name, p in outline.model.named_parameters() if p.requires_grad and "lora" not in name]
    assert any("cls.predictions.transform.dense" in name for name in trained)


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor", "stable_adamw", "adamw_bnb_8bit",
     "lion_8bit", "ademamix_8bit", "lion_32bit", "ademamix"],
)  # fmt: skip
def test_an_optimiser_keeps_what_it_is_said_to_keep(name: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.Linear(128, 96))
    try:
        options = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
        kind, values = Trainer.get_optimizer_cls_and_kwargs(options, model)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    optimizer = kind(model.parameters(), **values)
    for _ in range(2):
        model(torch.randn(4, 96)).sum().backward()
        optimizer.step()
    kept: dict[int, int] = {}
    for state in optimizer.state.values():
        for key, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and "qmap" not in str(key):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert optimizer_bytes(model, name) == pytest.approx(sum(kept.values()), rel=0.02, abs=16)


def test_a_prediction_is_the_sum_of_its_parts_and_grows_with_the_batch(base_folder: Path) -> None:
    totals = []
    for rows in (2, 4, 8):
        arguments = planned(base_folder, per_device_train_batch_size=rows, max_seq_length=32)
        outline = build_outline(arguments)
        size, evaluated = training_batch(outline, arguments), evaluation_batch(outline, arguments)
        prediction = predict(outline, arguments, size, evaluated, on_gpu=False)
        assert tuple(prediction.parts) == KINDS
        assert sum(prediction.parts.values()) == prediction.total
        assert (size.rows, size.tokens) == (rows, 32)
        totals.append(prediction.total)
    assert totals == sorted(set(totals))


def test_a_large_batch_of_an_evaluation_can_be_the_largest_moment(base_folder: Path) -> None:
    arguments = planned(base_folder, per_device_train_batch_size=1, per_device_eval_batch_size=256)
    outline = build_outline(arguments)
    batches = training_batch(outline, arguments), evaluation_batch(outline, arguments)
    assert predict(outline, arguments, *batches, on_gpu=False).phase == "evaluation"


def test_a_batch_is_as_long_as_its_longest_row_and_counted_in_tokens_where_asked(base_folder: Path) -> None:
    arguments = planned(base_folder, rows="line", max_tokens_per_batch=120, max_seq_length=40)
    outline = build_outline(arguments)
    assert training_batch(outline, arguments, 30).rows == 4
    assert training_batch(outline, arguments).tokens == 40
    assert training_batch(outline, arguments, 30).padded
    assert step_of(arguments, on_gpu=False).accumulation == 1


def test_weights_of_a_real_model_are_counted_once_where_they_are_tied(base_folder: Path) -> None:
    model = load_base(ModelArguments(model_name_or_path=str(base_folder))).model
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    buffers = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.buffers()}
    assert sum(weight_bytes(model).values()) == sum((storages | buffers).values())


def test_the_peak_of_the_process_is_above_what_it_held() -> None:
    held = resident_bytes()
    if held is None or not forget_peak(torch.device("cpu")):
        pytest.skip("this system does not tell")
    block = torch.ones(32 * 2**20)
    peak = peak_bytes(torch.device("cpu"), held)
    assert peak is not None
    assert 0.9 * block.nbytes < peak < 2 * block.nbytes
    assert (available_bytes() or 0) > 0
