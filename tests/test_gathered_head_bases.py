"""The head at masked rows alone on every kind of base: loss and gradients of an accumulated step are the dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.dropout import turn_off_dropout
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import find_door, sum_over_masked
from peft_mlm.metrics import cross_entropy_sum, masked_lm_loss
from peft_mlm.model import load_base
from tests.matrix_of_types import make_batches, whole_batch
from tests.tiny import perturb, save_base

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "dtype": "bfloat16", "bnb_4bit_compute_dtype": "bfloat16"},
}
# Rounding of the type that a base computes in, as a share of the largest gradient.
ROUNDING = {"float32": 1e-5, "nf4": 1e-5, "int8": 1e-5, "bfloat16": 3e-2, "nf4 in bfloat16": 3e-2}
HEADS = {"bert": "cls", "roberta": "lm_head", "modernbert": "head", "esm": "lm_head"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(root / name, name, hidden_size=64, intermediate_size=128) for name in HEADS}


def adapted(folder: Path, base: str, *, head: str | None) -> Any:
    model = load_base(ModelArguments(model_name_or_path=str(folder), **BASES[base])).model
    turn_off_dropout(model)
    trained = None if head is None else [head]
    wrapped = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4, modules_to_save=trained)))
    perturb(wrapped, scale=0.05)
    return wrapped.train()


def autocast(base: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in base)


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients in one row."""
    parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def dense(model: Any, base: str) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy of the whole batch from all logits, as a textbook has it."""
    batch = whole_batch(make_batches())
    with autocast(base):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), gradients(model)


def gathered(model: Any, base: str) -> tuple[float, torch.Tensor]:
    """Our loss over two micro-batches of three and five rows."""
    batch = whole_batch(make_batches())
    masked, door, total = (batch["labels"] != -100).sum(), find_door(model), 0.0
    assert door is not None
    for rows in (slice(0, 3), slice(3, None)):
        inputs = {name: tensor[rows] for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        with autocast(base):
            loss = masked_lm_loss(model, inputs, labels, masked, door=door)
        assert loss.dtype == torch.float32
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model_type", HEADS)
def test_an_accumulated_step_has_the_loss_and_the_gradients_of_the_dense_batch(
    model_type: str, base: str, trained_head: bool, folders: dict[str, Path]
) -> None:
    model = adapted(folders[model_type], base, head=HEADS[model_type] if trained_head else None)
    loss, wanted = dense(model, base)
    with fused_lora(model):
        given_loss, given = gathered(model, base)
    assert given.shape == wanted.shape
    scale = float(wanted.abs().max())
    assert scale > 1e-3
    assert given_loss == pytest.approx(loss, rel=ROUNDING[base] / 4)
    assert float((given - wanted).abs().max()) <= ROUNDING[base] * scale
    assert float((given - wanted).norm()) <= ROUNDING[base] * float(wanted.norm())


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_in_many_pieces_too(base: str, folders: dict[str, Path]) -> None:
    model = adapted(folders["bert"], base, head="cls")
    _, wanted = dense(model, base)
    batch = whole_batch(make_batches())
    labels = batch.pop("labels")
    with autocast(base):
        total = sum_over_masked(model, batch, labels, cross_entropy_sum, door=find_door(model), logits_bytes=300)
    (total / (labels != -100).sum()).backward()
    assert float((gradients(model) - wanted).abs().max()) <= ROUNDING[base] * float(wanted.abs().max())


@pytest.mark.parametrize("base", ["float32", "nf4", "int8", "bfloat16"])
@pytest.mark.parametrize("model_type", HEADS)
def test_activation_checkpointing_gives_the_same_gradients(
    model_type: str, base: str, folders: dict[str, Path]
) -> None:
    model = adapted(folders[model_type], base, head=HEADS[model_type])
    with fused_lora(model):
        loss, wanted = gathered(model, base)
        model.get_base_model().activation_checkpointing_enable()
        assert model.get_base_model().is_activation_checkpointing
        again, given = gathered(model, base)
    assert again == pytest.approx(loss, rel=ROUNDING[base] / 4)
    assert float((given - wanted).abs().max()) <= ROUNDING[base] * float(wanted.abs().max())
