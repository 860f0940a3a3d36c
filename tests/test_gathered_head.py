"""The head at masked positions alone: the same loss and gradients as the whole model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.gathered_head import Door, find_door, sum_over_masked
from peft_mlm.metrics import cross_entropy_sum
from tests.tiny import MODEL_TYPES, perturb, tiny_model


def masked_batch(rows: int = 4, length: int = 11, share: float = 0.3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 25, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    chosen = (torch.rand(ids.shape, generator=generator) < share) & (attention == 1)
    labels = torch.where(chosen, ids, torch.full_like(ids, IGNORE_INDEX))
    return {"input_ids": ids.masked_fill(chosen, 4), "attention_mask": attention}, labels


def adapted(model_type: str, **options: Any) -> Any:
    model = tiny_model(model_type)
    wrapped = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4, **options))).double()
    perturb(wrapped)
    return wrapped.eval()


def by_hand(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_and_gradients_are_those_of_the_whole_model_in_one_piece_and_in_several(model_type: str) -> None:
    model, (inputs, labels) = adapted(model_type), masked_batch()
    door = find_door(model)
    assert door is not None
    expected = by_hand(model, inputs, labels)
    wanted = gradients(model, expected)
    for logits_bytes in (2**28, 4 * 25 * 3, 1):
        total = sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door, logits_bytes=logits_bytes)
        assert total.item() == pytest.approx(expected.item(), abs=1e-10)
        given = gradients(model, total)
        assert len(given) == len(wanted) > 0
        assert max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)) < 1e-10


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "distilbert", "electra", "esm"])
def test_a_trained_head_and_a_full_model_get_the_same_gradients(model_type: str) -> None:
    heads = {"modernbert": "head", "distilbert": "vocab_transform", "electra": "generator_predictions"}
    head = heads.get(model_type, "cls" if model_type == "bert" else "lm_head")
    inputs, labels = masked_batch()
    for model in (adapted(model_type, modules_to_save=[head]), tiny_model(model_type).double()):
        door = find_door(model)
        wanted = gradients(model, by_hand(model, inputs, labels))
        for logits_bytes in (2**28, 4 * 25 * 3):
            total = sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door, logits_bytes=logits_bytes)
            given = gradients(model, total)
            assert len(given) == len(wanted)
            assert max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)) < 1e-10


def test_the_head_runs_on_no_more_rows_than_are_masked_and_logits_stay_within_their_bytes() -> None:
    model, (inputs, labels) = adapted("bert"), masked_batch()
    rows: list[int] = []
    decoder = model.get_base_model().cls.predictions.decoder
    handle = decoder.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    masked, door = int((labels != IGNORE_INDEX).sum()), find_door(model)
    rows.clear()
    with torch.no_grad():
        sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door)
        assert rows == [masked]
        rows.clear()
        sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door, logits_bytes=4 * 25 * 3)
    handle.remove()
    assert max(rows) == 3
    assert sum(rows) == masked + 1  # one row where the encoder runs


def test_dropout_of_the_head_is_drawn_alike_when_a_piece_is_computed_again() -> None:
    """Gradients of a piece belong to the loss that was reported, dropout and all."""
    model, (inputs, labels) = adapted("bert"), masked_batch()
    transform = model.get_base_model().cls.predictions.transform
    transform.dense = nn.Sequential(transform.dense, nn.Dropout(0.5))
    model.train()
    for module in model.get_base_model().bert.modules():
        module.training = False
    kept: list[float] = []

    def function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kept.append(logits.sum().item())
        return cross_entropy_sum(logits, targets)

    total = sum_over_masked(model, inputs, labels, function, door=find_door(model), logits_bytes=4 * 25 * 3)
    first = kept.copy()
    gradients(model, total)
    assert sorted(kept[len(first) :]) == pytest.approx(sorted(first), abs=1e-9)


class _HeadOverTheRow(nn.Module):
    """A head whose result at one place depends on the whole row."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.head(hidden - hidden.mean(dim=1, keepdim=True))


def test_a_model_that_gives_other_logits_through_the_door_is_run_whole() -> None:
    model: Any = tiny_model("bert")
    assert find_door(model) == ("cls", "bert.encoder.layer.1.attention")
    model.cls = _HeadOverTheRow(model.cls)
    assert find_door(model) is None
    inputs, labels = masked_batch()
    total = sum_over_masked(model, inputs, labels, cross_entropy_sum, door=None)
    assert torch.allclose(total, by_hand(model, inputs, labels))


def test_the_mode_of_the_model_and_its_hooks_are_left_as_they_were() -> None:
    model = tiny_model("roberta").train()
    before = {name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    door = find_door(model)
    inputs, labels = masked_batch()
    sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door, logits_bytes=1).backward()
    after = {name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert after == before
    assert "forward" not in model.roberta.__dict__


def test_the_last_layer_ends_at_masked_rows_and_is_whole_again_under_activation_checkpointing() -> None:
    model, (inputs, labels) = adapted("bert"), masked_batch()
    masked, door = int((labels != IGNORE_INDEX).sum()), find_door(model)
    seen: list[int] = []
    last = model.get_base_model().bert.encoder.layer[-1].intermediate
    last.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    wanted = gradients(model, sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door))
    assert seen == [masked]
    seen.clear()
    model.get_base_model().activation_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = gradients(model, sum_over_masked(model, inputs, labels, cross_entropy_sum, door=door))
    assert seen == [labels.numel()] * 2  # once forwards, once more for the gradients
    assert max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)) < 1e-10


def test_a_last_layer_that_is_passed_over_leaves_the_picking_to_the_head() -> None:
    model, (inputs, labels) = adapted("bert"), masked_batch()
    door = find_door(model)
    del model.get_base_model().bert.encoder.layer[-1:]
    nothing = Door(door.head, "bert.encoder.layer.0.output.dropout")
    expected = by_hand(model, inputs, labels)
    total = sum_over_masked(model, inputs, labels, cross_entropy_sum, door=Door(door.head))
    assert torch.allclose(total, expected)
    model.get_base_model().bert.encoder.layer[0].output.forward = lambda hidden, residual: residual
    expected = by_hand(model, inputs, labels)
    assert torch.allclose(sum_over_masked(model, inputs, labels, cross_entropy_sum, door=nothing), expected)
