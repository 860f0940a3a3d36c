"""What a step is said to hold, against the same step with values, whose tensors are counted as they live."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32

from peft_mlm.adapter import count_parameters, plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.config import read_arguments
from peft_mlm.dropout import turn_off_dropout
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import base_of, find_door
from peft_mlm.live_memory import LiveBytes, without_values
from peft_mlm.memory import build_outline
from peft_mlm.metrics import masked_lm_loss
from peft_mlm.model import load_base
from peft_mlm.model_types import MODEL_TYPES
from peft_mlm.step_memory import Batch, Step, evaluation_bytes, training_bytes
from tests.tiny import save_base

ROWS, TOKENS, MASKED = 4, 24, 14
SIZES: dict[str, object] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
USABLE = [name for name, row in MODEL_TYPES.items() if row.refusal is None]


def real_model(folder: Path, *, lora: bool, attention: str | None = None) -> Any:
    base = load_base(ModelArguments(model_name_or_path=str(folder), attn_implementation=attention))
    if not lora:
        return base.model
    turn_off_dropout(base.model)
    return wrap(base.model, plan_adapter(base.model, PEFTArguments(use_lora=True)))


def outline_of(folder: Path, *, lora: bool, attention: str | None = None) -> Any:
    values: dict[str, Any] = {"model_name_or_path": folder, "use_lora": lora, "max_seq_length": TOKENS}
    if attention is not None:
        values["attn_implementation"] = attention
    return build_outline(read_arguments(values=values, planned=True))


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.arange(ROWS * TOKENS).remainder(20).add(5).view(ROWS, TOKENS)
    labels = torch.full_like(ids, -100)
    labels.flatten()[:MASKED] = 6
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def measured(model: Any, *, half: bool = False, checkpointing: bool = False, batches: int = 1) -> int:
    """The largest sum of the storages that are alive in a real step; weights and inputs are not counted."""
    base, door = base_of(model), find_door(model)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        base.disable_input_require_grads()
    if half:
        model.forward = convert_outputs_to_fp32(model.forward)
    model.train()
    counter = LiveBytes(held=[*model.parameters(), *model.buffers()])
    with counter, fused_lora(model):
        for _ in range(batches):
            inputs, labels = batch()
            with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                loss = masked_lm_loss(model, inputs, labels, door=door)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
    return sum(counter.peak.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "bert", **SIZES)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"half": True},
        {"checkpointing": True},
        {"attention": "eager"},
        {"batches": 2},
        {"half": True, "checkpointing": True},
    ],
    ids=str,
)
def test_a_step_holds_what_the_same_step_with_values_holds(folder: Path, lora: bool, how: dict[str, Any]) -> None:
    attention = how.get("attention")
    real = real_model(folder, lora=lora, attention=attention)
    outline = outline_of(folder, lora=lora, attention=attention)
    options = {name: value for name, value in how.items() if name != "attention"}
    held = measured(real, **options)
    step = Step(
        half=how.get("half", False), checkpointing=how.get("checkpointing", False), accumulation=how.get("batches", 1)
    )
    said = training_bytes(outline.model, outline.door, Batch(ROWS, TOKENS, MASKED), step)
    assert sum(said.values()) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("model_type", USABLE)
def test_every_type_is_counted_without_values(model_type: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", model_type)
    real, outline = real_model(tmp_path / "base", lora=True), outline_of(tmp_path / "base", lora=True)
    assert (outline.trainable, outline.total) == count_parameters(real)
    assert {n for n, p in real.named_parameters() if p.requires_grad} == {
        n for n, p in outline.model.named_parameters() if p.requires_grad
    }
    said = training_bytes(outline.model, outline.door, Batch(ROWS, TOKENS, MASKED), Step())
    assert sum(said.values()) == pytest.approx(measured(real), rel=0.15)


def test_checkpointing_eager_attention_and_a_gpu_change_what_is_held(folder: Path) -> None:
    outline, size = outline_of(folder, lora=False), Batch(8, 48, 57)
    eager = outline_of(folder, lora=False, attention="eager")

    def bytes_of(model: Any, **how: Any) -> int:
        return sum(training_bytes(model.model, model.door, size, Step(**how)).values())

    assert bytes_of(outline, checkpointing=True) < bytes_of(outline)
    # with dropout a GPU's kernels of sdpa keep no scores, a CPU's code does
    assert bytes_of(outline, on_gpu=True) < bytes_of(outline)
    assert bytes_of(outline, on_gpu=True) < bytes_of(eager, on_gpu=True)
    assert bytes_of(outline, on_gpu=True, half=True, checkpointing=True) < bytes_of(outline, on_gpu=True)


def test_an_evaluation_holds_what_it_holds_with_values(folder: Path) -> None:
    real, outline = real_model(folder, lora=True), outline_of(folder, lora=True)
    door = find_door(real)
    assert outline.door == door
    inputs, labels = batch()
    counter = LiveBytes(held=[*real.parameters(), *real.buffers(), *inputs.values(), labels])
    with counter, torch.no_grad():
        masked_lm_loss(real.eval(), inputs, labels, door=door)
    said = evaluation_bytes(outline.model, outline.door, Batch(ROWS, TOKENS, MASKED), Step())
    assert sum(said.values()) == pytest.approx(sum(counter.peak.values()), rel=0.15)


def test_live_bytes_are_those_of_tensors_that_are_alive_at_once() -> None:
    with LiveBytes() as counter:
        first = torch.zeros(1000)
        second = torch.zeros(500, dtype=torch.float64)
        view = first[:10]
        del second
        third = torch.zeros(250)
    assert counter.peak == {"activations": 8000}
    assert view.untyped_storage().nbytes() + third.untyped_storage().nbytes() == 5000


def test_a_model_is_as_it_was_after_a_run_without_values(folder: Path) -> None:
    model = real_model(folder, lora=True)
    before = {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()}
    with without_values(model), LiveBytes(masked=3):
        assert model(input_ids=torch.zeros(2, 8, dtype=torch.long)).logits.shape[:2] == (2, 8)
    assert {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()} == before
