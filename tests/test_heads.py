"""Heads that a checkpoint does not hold, or not all of: nothing random is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from peft_mlm.adapter import load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.heads import outermost, plan_fresh_head, tied_parameters, untied_modules
from peft_mlm.model import load_base
from tests.tiny import MODEL_TYPES, perturb, same, save_base, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        given: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return given


def fill_free_memory(value: float) -> None:
    """Leave a value in the memory that the next tensors of these sizes are likely to get."""
    kept = [torch.full((size,), value) for size in (25, 32, 32 * 25, 32 * 32) for _ in range(40)]
    del kept


def head_tensors(folder: Path, model_type: str) -> dict[str, torch.Tensor]:
    model = tiny_model(model_type)
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    head = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in encoder}
    tensors = load_file(folder / "model.safetensors")
    assert head & set(tensors)
    return {name: tensor for name, tensor in tensors.items() if name in head}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_whichever_part_of_the_head_is_missing_is_shipped_or_zero_and_said(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    file = folder / "model.safetensors"
    whole = load_file(file)
    for missing in head_tensors(folder, model_type):
        save_file({name: t for name, t in whole.items() if name != missing}, file, metadata={"format": "pt"})
        fill_free_memory(7.0)
        base = load_base(ModelArguments(model_name_or_path=str(folder)))
        assert base.fresh_parameters == (missing,)
        assert any(f"does not hold {missing}" in notice for notice in base.notices)
        plan = plan_fresh_head(base.model, base.fresh_parameters)
        shipped = any(missing.startswith(f"{module}.") for module in plan.modules)
        zero = not base.model.get_parameter(missing).count_nonzero()
        assert shipped or (zero and plan.left_at_zero == (missing,)), missing


@pytest.mark.parametrize("model_type", ["bert", "esm", "data2vec-text", "distilbert", "modernbert", "rembert"])
def test_a_model_with_a_fresh_part_is_the_same_after_reloading(model_type: str, tmp_path: Path) -> None:
    """Under another seed and over other memory."""
    folder = save_base(tmp_path / "base", model_type)
    file = folder / "model.safetensors"
    whole = load_file(file)
    for missing in head_tensors(folder, model_type):
        save_file({name: t for name, t in whole.items() if name != missing}, file, metadata={"format": "pt"})
        fill_free_memory(7.0)
        torch.manual_seed(1)
        base = load_base(ModelArguments(model_name_or_path=str(folder)))
        plan = plan_adapter(base.model, PEFTArguments(use_lora=True), fresh_parameters=base.fresh_parameters)
        shipped = any(missing.startswith(f"{module}.") for module in plan.trained_modules)
        assert shipped or any(missing in n and "stays at zero" in n for n in plan.notices), missing
        model = wrap(base.model, plan)
        perturb(model)
        trained = logits(model)
        save_adapter(model, tmp_path / "adapter", base_name="base")
        fill_free_memory(-5.0)
        torch.manual_seed(2)
        again = load_base(ModelArguments(model_name_or_path=str(folder)))
        assert same(logits(load_adapter(again.model, tmp_path / "adapter")), trained), missing


def test_transformers_leaves_a_missing_bias_to_chance(tmp_path: Path) -> None:
    """In data2vec-text's head the bias that a checkpoint lacks is whatever the memory held."""
    folder = save_base(tmp_path / "base", "data2vec-text")
    whole = load_file(folder / "model.safetensors")
    del whole["lm_head.bias"]
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    found = []
    for value in (7.0, -5.0):
        fill_free_memory(value)
        theirs = AutoModelForMaskedLM.from_pretrained(folder)
        fill_free_memory(value)
        ours = load_base(ModelArguments(model_name_or_path=str(folder))).model
        assert not ours.lm_head.bias.count_nonzero()
        found.append(theirs.lm_head.bias.count_nonzero().item())
    assert any(found)


def test_a_whole_matrix_is_not_shipped_for_a_zero_bias(tmp_path: Path) -> None:
    model = tiny_model("rembert")
    with torch.no_grad():
        model.cls.predictions.decoder.bias.zero_()
    head = plan_fresh_head(model, ["cls.predictions.decoder.bias"])
    assert (head.modules, head.left_at_zero) == ((), ("cls.predictions.decoder.bias",))
    both = plan_fresh_head(model, ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight"])
    assert (both.modules, both.left_at_zero) == (("cls.predictions.decoder",), ())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_head_trained_by_name_covers_all_but_what_is_tied(model_type: str) -> None:
    model = tiny_model(model_type)
    tied = tied_parameters(model)
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    tops = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in encoder}
    names = [part for top in sorted(tops) for part in untied_modules(model, top)]
    covered = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    assert not covered & tied
    loose = {
        name
        for name, p in model.named_parameters()
        if id(p) not in covered | tied | encoder and not name.endswith("bias")
    }
    assert not loose


def test_modules_inside_others_of_the_list_are_left_out() -> None:
    assert outermost(["lm_head", "lm_head.dense", "head", "encoder.lm_head.dense"]) == [
        "encoder.lm_head.dense",
        "head",
        "lm_head",
    ]


def test_a_fresh_part_inside_a_module_that_the_user_names_is_trained_once() -> None:
    model = tiny_model("rembert")
    options = PEFTArguments(use_lora=True, modules_to_save=["cls"])
    plan = plan_adapter(model, options, fresh_parameters=["cls.predictions.dense.weight"])
    assert plan.trained_modules == ("cls",)
    wrapped = wrap(model, plan)
    assert sum("modules_to_save" in name for name, _ in wrapped.named_parameters()) == 6
