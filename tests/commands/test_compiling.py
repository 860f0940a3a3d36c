"""The encoder's layers compiled: the same numbers, few graphs whatever the shapes, the head gathered as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.compiling import compile_layers
from peft_mlm.dropout import turn_off_dropout
from peft_mlm.errors import ArgumentsError
from peft_mlm.gathered_head import Door, find_door
from peft_mlm.heads import encoder_layers
from peft_mlm.metrics import masked_lm_loss
from tests.commands.conftest import train
from tests.tiny import MODEL_TYPES, tiny_model

SHAPES = ((4, 16), (4, 24), (3, 24), (5, 40), (1, 16), (6, 8), (2, 32))
TYPES = ("bert", "modernbert")


@pytest.fixture(autouse=True)
def _compiler_starts_anew() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def adapted(model_type: str) -> Any:
    model = tiny_model(model_type, num_hidden_layers=3, n_layers=3)
    turn_off_dropout(model)
    return wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4))).train()


def step(model: Any, shape: tuple[int, int], door: Door | None) -> tuple[float, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(5, 25, shape, generator=generator)
    attention = torch.ones_like(ids)
    attention[0, -2:] = 0
    chosen = (torch.rand(shape, generator=generator) < 0.3) & (attention == 1)
    chosen[0, 1] = True
    inputs = {"input_ids": ids.masked_fill(chosen, 4), "attention_mask": attention}
    loss = masked_lm_loss(model, inputs, ids.masked_fill(~chosen, -100), door=door)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("model_type", TYPES)
def test_compiled_layers_give_the_same_steps_with_few_graphs_for_many_shapes(model_type: str) -> None:
    model, plain = adapted(model_type), adapted(model_type)
    plain.load_state_dict(model.state_dict())
    names = list(model.state_dict())
    door = find_door(model)
    count = compile_layers(model.get_base_model(), door, backend="eager", mode=None, device="cpu")
    assert count == (3 if door is None or door.last_layer is None else 2)
    for shape in SHAPES:
        loss, gradients = step(model, shape, door)
        wanted, expected = step(plain, shape, door)
        assert loss == pytest.approx(wanted, rel=1e-5)
        largest = max(float(g.abs().max()) for g in expected)
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) < 1e-4 * largest
    # kinds of layers (the first has no gradient to pass on) x (first shape, other lengths, other rows, a single row)
    assert 0 < counters["stats"]["unique_graphs"] <= 12
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_layers_of_an_encoder_are_found(model_type: str) -> None:
    model = tiny_model(model_type, num_hidden_layers=3, n_layers=3)
    layers = encoder_layers(model)
    assert len(layers) == (1 if model_type == "albert" else 3)
    within = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    tables = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding))
    assert within > 0.8 * (sum(p.numel() for p in model.base_model.parameters()) - tables)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "eval_loss") if name in record]


def test_a_compiled_run_is_the_run(base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path) -> None:
    changes = {"activation_checkpointing": True, "logging_steps": 1, "max_steps": 6, "eval_steps": 3}
    plain = train(base_folder, text_file, held_out, tmp_path / "plain", **changes)
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = train(base_folder, text_file, held_out, tmp_path / "compiled", **changes, **how)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 8


def test_without_a_compiler_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ArgumentsError, match="C\\+\\+ compiler"):
        compile_layers(tiny_model("bert"), None, backend="inductor", mode=None, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_compiled_run_is_the_run(base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path) -> None:
    changes = {"logging_steps": 1, "max_steps": 12, "eval_steps": 6, "dtype": "float32", "tf32": False}
    plain = train(base_folder, text_file, held_out, tmp_path / "plain", **changes)
    compiled = train(base_folder, text_file, held_out, tmp_path / "compiled", **changes, torch_compile=True)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 12
