"""LoRA in fewer passes: PEFT's own numbers and gradients, and PEFT's own code where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.fused_lora import fused_lora
from tests.tiny import MODEL_TYPES, perturb, tiny_model

IDS = torch.arange(5, 25).view(2, 10)


def lora(model_type: str = "bert", **options: Any) -> Any:
    model = tiny_model(model_type)
    wrapped = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4, **options)))
    perturb(wrapped)
    return wrapped.eval()


def results(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.float().square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_and_gradients_are_pefts_on_every_kind_of_model(model_type: str) -> None:
    model = lora(model_type).double()
    expected, wanted = results(model)
    with fused_lora(model) as count:
        given, gradients = results(model)
    assert count > 0
    assert torch.allclose(given, expected, atol=1e-10, rtol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-9 * max(1.0, float(wanted[name].abs().max())), rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True, "lora_alpha": 32}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 1}}],
    ids=["rslora", "patterns"],
)
def test_scalings_and_ranks_of_single_layers_are_kept(options: dict[str, Any]) -> None:
    model = lora(**options).double()
    expected, _ = results(model)
    with fused_lora(model) as count:
        given, _ = results(model)
    assert count == 12
    assert torch.allclose(given, expected, atol=1e-10, rtol=0)


def test_under_autocast_the_numbers_are_pefts_to_the_rounding_of_bfloat16() -> None:
    for base_type in (torch.float32, torch.bfloat16):
        model = lora()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else base_type)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, wanted = results(model)
            with fused_lora(model):
                given, gradients = results(model)
        assert float((given - expected).abs().max()) < 0.05 * float(expected.abs().max())
        for name, gradient in gradients.items():
            assert gradient.dtype == wanted[name].dtype == torch.float32
            assert float((gradient - wanted[name]).norm()) < 0.1 * float(wanted[name].norm())


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"bias": "all"}], ids=str
)
def test_what_does_not_fit_runs_by_pefts_own_code(options: dict[str, Any]) -> None:
    model = get_peft_model(tiny_model("bert"), LoraConfig(r=4, target_modules=["query", "value"], **options)).eval()
    perturb(model)
    with fused_lora(model) as count:
        assert count == 0


def test_a_merged_or_disabled_adapter_is_obeyed_while_fused() -> None:
    model = lora()
    adapted, _ = results(model)
    with fused_lora(model), torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        model.base_model.merge_adapter()
        merged = model(input_ids=IDS).logits
        model.base_model.unmerge_adapter()
    assert float((base - adapted).abs().max()) > 1e-3
    assert torch.allclose(merged, adapted, atol=1e-5)


def test_layers_are_pefts_again_afterwards_also_after_an_error() -> None:
    model = lora()
    with pytest.raises(KeyError), fused_lora(model):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_frozen_a_gets_no_gradient() -> None:
    model = lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with fused_lora(model):
        _, gradients = results(model)
    assert gradients
    assert all("lora_B" in name for name in gradients)
