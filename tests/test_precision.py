"""Types of a run: chosen on a GPU, followed everywhere; a base in bfloat16 learns as one in float32."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_mlm.adapter import load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.config import Arguments, read_arguments
from peft_mlm.errors import AdapterError, ArgumentsError
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import find_door
from peft_mlm.metrics import masked_lm_loss
from peft_mlm.model_types import MODEL_TYPES
from peft_mlm.precision import WHY, check_optimiser, check_types, settle_types, with_precision
from tests.matrix_of_types import make_batches
from tests.tiny import perturb, tiny_model


def asked(**given: Any) -> Arguments:
    values = {"model_name_or_path": "base", "train_file": "texts.txt", "output_dir": "run", **given}
    return read_arguments(values=values)


def test_an_adapter_on_a_gpu_with_bfloat16_gets_its_base_in_it_and_says_so() -> None:
    settled = with_precision(asked(use_lora=True), "roberta", has_bfloat16=True)
    assert (settled.model.dtype, settled.training["bf16"]) == ("bfloat16", True)
    assert (settled.sources["dtype"], settled.sources["bf16"]) == (WHY, WHY)
    assert "--dtype float32" in settled.notices[-1]


@pytest.mark.parametrize(
    "given",
    [
        {"use_lora": False},
        {"use_lora": True, "dtype": "float32"},
        {"use_lora": True, "bf16": False},
        {"use_lora": True, "fp16": True},
        {"use_lora": True, "dtype": "auto"},
    ],
)
def test_what_the_user_says_about_types_holds_and_a_whole_model_is_trained_in_float32(given: dict[str, Any]) -> None:
    arguments = asked(**given)
    assert with_precision(arguments, "bert", has_bfloat16=True) is arguments


def test_without_such_a_gpu_nothing_is_chosen() -> None:
    arguments = asked(use_lora=True)
    assert with_precision(arguments, "bert", has_bfloat16=False) is arguments
    assert settle_types(asked(use_lora=True, use_cpu=True)).model.dtype == "float32"


@pytest.mark.parametrize(
    "given",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "lora_ga"},
        {"peft_method": "lora", "use_lora": False, "peft_config": {"bias": "all"}},
        {"peft_method": "osf", "use_lora": False},
    ],
)
def test_an_adapter_that_changes_the_base_keeps_it_in_float32(given: dict[str, Any]) -> None:
    settled = with_precision(asked(**{"use_lora": True, **given}), "bert", has_bfloat16=True)
    assert (settled.model.dtype, settled.training["bf16"]) == ("float32", True)


def test_types_that_cannot_compute_so_are_left_alone() -> None:
    for name, row in MODEL_TYPES.items():
        settled = with_precision(asked(use_lora=True), name, has_bfloat16=True)
        assert settled.training.get("bf16", False) == row.mixed_precision
        assert (settled.model.dtype == "bfloat16") == (row.mixed_precision and row.half)


def test_a_paged_optimiser_on_the_cpu_has_its_plain_form_named() -> None:
    with pytest.raises(ArgumentsError, match="adamw_torch"):
        check_optimiser({"optim": "paged_adamw_32bit", "use_cpu": True})
    check_optimiser({"optim": "adamw_8bit", "use_cpu": True})


def test_biases_of_a_base_in_bfloat16_are_not_trained() -> None:
    arguments = asked(peft_method="lora", peft_config={"bias": "all"}, dtype="bfloat16")
    with pytest.raises(AdapterError, match="--dtype float32"):
        check_types(arguments)


@pytest.mark.parametrize("method", ["lora", "ln_tuning"])
def test_what_is_loaded_onto_a_base_in_bfloat16_is_not_rounded(method: str, tmp_path: Path) -> None:
    def base() -> Any:
        return tiny_model("bert").to(torch.bfloat16)

    model = base()
    adapted = wrap(model, plan_adapter(model, PEFTArguments(peft_method=method, modules_to_save=["cls"])))
    perturb(adapted, scale=1e-3)
    wanted = {name: p.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in wanted.values()} == {torch.float32}
    save_adapter(adapted, tmp_path, base_name="base")
    loaded = dict(load_adapter(base(), tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in wanted.items())


class _Casts(TorchDispatchMode):
    """Notes which frozen weights are cast to another type."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.frozen = {p.data_ptr(): name for name, p in model.named_parameters() if not p.requires_grad}
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.frozen:
            self.seen.append(self.frozen[args[0].data_ptr()])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "distilbert", "esm"])
def test_no_frozen_weight_is_cast_in_a_step_on_a_base_in_bfloat16(model_type: str, fused: bool) -> None:
    """In float32 every linear layer's weight is, at each step: the test would see it."""
    (batch,) = make_batches(1)
    batch = dict(batch)
    labels = batch.pop("labels")
    cast = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(model_type).to(dtype)
        adapted: Any = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True)))
        door = find_door(adapted)
        fusing = fused_lora(adapted) if fused else contextlib.nullcontext()
        with fusing, _Casts(adapted) as casts, torch.autocast("cpu", torch.bfloat16):
            masked_lm_loss(adapted, batch, labels, door=door).backward()
        cast[dtype] = casts.seen
    assert cast[torch.bfloat16] == []
    assert len(cast[torch.float32]) >= 4
