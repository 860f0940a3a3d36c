"""Nothing is computed that only a frozen weight's gradient would need, and nothing flows below the lowest adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_mlm
from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import find_door
from peft_mlm.heads import encoder_layers
from peft_mlm.metrics import masked_lm_loss
from tests.commands.conftest import train
from tests.matrix_of_types import make_batches
from tests.tiny import MODEL_TYPES, tiny_model

# ALBERT's layers are one layer, run again and again.
TYPES = [name for name in MODEL_TYPES if name != "albert"]


def upper_adapted(model_type: str) -> Any:
    """A model whose second and last layer alone has adapters."""
    model = tiny_model(model_type)
    return wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, layers_to_transform=[1]))).train()


def loss_of(model: Any) -> torch.Tensor:
    batch = {name: tensor[:3] for name, tensor in make_batches(1)[0].items()}
    labels = batch.pop("labels")
    return masked_lm_loss(model, batch, labels, door=find_door(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_no_gradient_flows_below_the_lowest_adapter(model_type: str, checkpointing: bool) -> None:
    model = upper_adapted(model_type)
    base = model.get_base_model()
    if checkpointing:
        if not base.supports_gradient_checkpointing:
            pytest.skip("transformers has no activation checkpointing for it")
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()  # as the trainer does
    first, second = encoder_layers(base).values()
    followed: list[bool] = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        followed.append(hidden.requires_grad)

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in (first, second)]
    loss = loss_of(model)
    seen = followed[-2:] if checkpointing else followed
    assert seen[0] is False
    assert seen[-1] is True
    loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all((p.grad is not None) <= (name in trained) for name, p in model.named_parameters())
    assert any(p.grad is not None for p in model.parameters())


class _Products(TorchDispatchMode):
    """Notes the shapes that matrix products and reductions of a backward pass give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_backward_pass_makes_no_gradient_of_a_frozen_matrix(model_type: str, fused: bool) -> None:
    """32 x 64 and the like are shapes of weights alone: batches have 3 x 24 tokens, adapters rank 3."""
    model = tiny_model(model_type)
    adapted: Any = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=3)))
    linears = [module.weight for module in adapted.modules() if isinstance(module, nn.Linear)]
    frozen = {tuple(weight.shape) for weight in linears if not weight.requires_grad}
    frozen |= {shape[::-1] for shape in frozen}
    assert {(32, 64), (32, 32)} & frozen
    if fused:
        with fused_lora(adapted):
            loss = loss_of(adapted)
    else:
        loss = loss_of(adapted)
    with _Products() as seen:
        loss.backward()  # type: ignore[no-untyped-call]
    assert len(seen.shapes) > 10
    assert not frozen & set(seen.shapes)
    assert not [name for name in seen.names if "embedding" in name]


def test_a_run_with_activation_checkpointing_leaves_the_embeddings_out(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers marks the embeddings' output for gradients when it is switched on."""
    from transformers.models.roberta.modeling_roberta import RobertaEncoder

    plain, marked = RobertaEncoder.forward, []

    def forward(self: Any, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.training:
            marked.append(hidden.requires_grad)
            assert self.layer[0].gradient_checkpointing
        return plain(self, hidden, *args, **options)

    monkeypatch.setattr(RobertaEncoder, "forward", forward)
    changes = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    recomputed = train(
        base_folder, text_file, held_out, tmp_path / "recomputed", activation_checkpointing=True, **changes
    )
    assert len(marked) >= 4
    assert not any(marked)
    monkeypatch.undo()
    kept = train(base_folder, text_file, held_out, tmp_path / "kept", **changes)
    loss = [
        (run / "metrics.jsonl").read_text().splitlines()[0].split('"learning_rate"')[0] for run in (recomputed, kept)
    ]
    assert loss[0] == loss[1]
    assert peft_mlm.load(str(recomputed)).model.training is False
