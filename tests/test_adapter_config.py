"""Configurations of PEFT's methods made for a model: what they change, and options that fit its layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

from peft_mlm.adapter import load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.adapter_config import describe_method, loaded_kind
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.model import load_base
from peft_mlm.targets import encoder_linears, encoder_norms
from tests.matrix_of_methods import BASES, load_base_of_kind, logits, save_tiny_base
from tests.tiny import MODEL_TYPES, letter_tokenizer, perturb, same, save_base, save_encoder, tiny_model


def arguments_of(method: str, /, **options: Any) -> PEFTArguments:
    ours = {name: options.pop(name) for name in list(options) if name in PEFTArguments.__dataclass_fields__}
    return PEFTArguments(peft_method=method, peft_config=options, **ours)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norms_are_those_of_the_encoder_that_get_a_gradient(model_type: str) -> None:
    model = tiny_model(model_type)
    norms = encoder_norms(model)
    assert norms
    ids = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.pow(2).sum().backward()
    every = {
        n
        for n, m in model.base_model.named_modules()
        if "Norm" in type(m).__name__ and list(m.parameters(recurse=False))
    }
    prefix = model.base_model_prefix + "."
    for name in every:
        reached = model.base_model.get_submodule(name).weight.grad is not None
        assert (prefix + name in norms) == reached, name
    plan = plan_adapter(model, arguments_of("ln_tuning"))
    assert plan.target_modules == tuple(norms)


def test_each_method_changes_what_it_can_change_by_default() -> None:
    model = tiny_model("bert")
    linears = encoder_linears(model)
    assert list(plan_adapter(model, arguments_of("vera")).target_modules) == linears
    assert list(plan_adapter(model, arguments_of("beft")).target_modules) == linears
    biased = tiny_model("modernbert", attention_bias=True)
    assert {name.rpartition(".")[2] for name in plan_adapter(biased, arguments_of("beft")).target_modules} == {
        "Wqkv",
        "Wo",
    }
    assert all("attn" in name for name in plan_adapter(biased, arguments_of("beft")).target_modules)


def test_ia3_scales_the_inputs_of_layers_that_lead_back_and_the_outputs_of_the_others() -> None:
    model = wrap(base := tiny_model("esm"), plan_adapter(base, arguments_of("ia3")))
    sizes = {
        re.sub(r".*\.layer\.\d+\.(.*)\.ia3_l\.default", r"\1", name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if "ia3_l" in name
    }
    assert sizes["output.dense"] == (1, 64)  # its input
    assert sizes["intermediate.dense"] == (64, 1)  # its output
    assert sizes["attention.self.key"] == (32, 1)
    named = arguments_of("ia3", feedforward_modules=["query"], lora_target_modules=["query", "key"])
    model = wrap(base := tiny_model("esm"), plan_adapter(base, named))
    shapes = {name.split(".")[-3]: tuple(p.shape) for name, p in model.named_parameters() if "ia3_l" in name}
    assert shapes == {"query": (1, 32), "key": (32, 1)}


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("c3a", "block_size", 20),
        ("vblora", "vector_length", 20),
        ("oft", "oft_block_size", 20),
        ("road", "group_size", 20),
    ],
)
def test_sizes_that_divide_no_layer_are_replaced_by_the_largest_that_does(method: str, option: str, value: int) -> None:
    model = tiny_model("bert", hidden_size=20, num_attention_heads=2, intermediate_size=60)
    plan = plan_adapter(model, arguments_of(method))
    assert getattr(plan.config, option) == value
    assert any(notice.startswith(f"{option} is {value}, since PEFT's default of ") for notice in plan.notices)
    wrap(model, plan)
    with pytest.raises(AdapterError, match=rf"{option} is 7, which does not divide .*\(20.*can be one of: .*4"):
        plan_adapter(tiny_model("bert", hidden_size=20, num_attention_heads=2), arguments_of(method, **{option: 7}))


def test_sizes_that_divide_stay_and_are_not_told() -> None:
    plan = plan_adapter(tiny_model("bert"), arguments_of("boft"))
    assert plan.config.boft_block_size == 4
    assert plan.notices == ()


@pytest.mark.parametrize(
    ("method", "one", "other"), [("oft", "r", "oft_block_size"), ("boft", "boft_block_num", "boft_block_size")]
)
def test_of_two_ways_to_say_a_size_one_is_enough(method: str, one: str, other: str) -> None:
    model = tiny_model("bert")
    plan = plan_adapter(model, arguments_of(method, **{one: 8}))
    assert (getattr(plan.config, one), getattr(plan.config, other)) == (8, 0)
    wrap(model, plan)


@pytest.mark.parametrize(
    ("model_type", "method", "options", "said"),
    [
        ("bert", "vara", {}, "there is no such method. Nearest: vera"),
        ("bert", "prompt_tuning", {}, "peft_method prompt_tuning cannot be used"),
        ("bert", "vera", {"vector_length": 3}, "It belongs to vblora"),
        ("bert", "vera", {"r": "x"}, "'x' is not a whole number"),
        ("bert", "hira", {"rank_pattern": {"qury": 3}}, "qury matches no target"),
        ("bert", "ln_tuning", {"lora_target_modules": ["query"]}, r"none of the layers that this method .*LayerNorm"),
        ("bert", "ia3", {"feedforward_modules": ["qury"]}, "qury names none of the layers"),
        ("modernbert", "beft", {}, "trains biases, which could not be merged into .*they have none"),
        ("modernbert", "lora", {"lora_bias": True}, "lora_bias trains biases, which could not be merged"),
        ("bert", "trainable_tokens", {"token_indices": [3, 25]}, r"\[25\], but the ids of this vocabulary are 0 to 24"),
        ("bert", "trainable_tokens", {}, "no token is named"),
        (
            "bert",
            "trainable_tokens",
            {"token_indices": [3], "modules_to_save": ["cls"]},
            "modules_to_save is given, but",
        ),
        ("bert", "lora", {"lora_bias": True, "use_dora": True}, "PEFT does not accept these options of lora"),
        ("bert", "adalora", {}, "PEFT does not accept these options of adalora"),  # no schedule without steps
        ("bert", "vera", {"use_dora": True}, "peft_method vera has no such option"),
        ("bert", "vera", {"loraplus_lr_ratio": 16.0}, "it is for LoRA's matrices"),
        ("bert", "lora", {"init_lora_weights": "loftq"}, "cannot be used on a float base"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    model_type: str, method: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        plan_adapter(tiny_model(model_type), arguments_of(method, **options))


def test_a_schedule_gets_the_steps_of_the_run_if_it_is_not_given_its_own() -> None:
    model = tiny_model("bert")
    assert plan_adapter(model, arguments_of("adalora"), total_steps=70).config.total_step == 70
    assert plan_adapter(model, arguments_of("adalora", total_step=50), total_steps=70).config.total_step == 50


@pytest.mark.parametrize("method", ["vera", "ia3", "boft", "ln_tuning", "adalora", "miss", "road"])
def test_a_fresh_head_is_trained_and_shipped_with_any_method(method: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder")
    base = load_base(ModelArguments(model_name_or_path=str(folder)))
    small = arguments_of(method, **({"r": 4} if method == "miss" else {}))
    plan = plan_adapter(base.model, small, fresh_parameters=base.fresh_parameters, total_steps=50)
    assert plan.trained_modules
    model = wrap(base.model, plan)
    perturb(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter", base_name="encoder")
    torch.manual_seed(99)  # another random head
    again = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(folder), tmp_path / "adapter")
    assert same(logits(again), trained)


def test_a_fresh_head_beside_a_method_that_cannot_train_it_is_refused(tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(save_encoder(tmp_path / "encoder"))))
    with pytest.raises(AdapterError, match=r"trainable_tokens cannot train cls.*Use another method, such as lora"):
        plan_adapter(
            base.model, arguments_of("trainable_tokens", token_indices=[5]), fresh_parameters=base.fresh_parameters
        )


@pytest.mark.parametrize("method", ["lora", "adalora", "trainable_tokens"])
def test_rows_of_new_tokens_are_trained_by_the_methods_that_can(method: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    letter_tokenizer(extra=["<new1>", "<new2>"]).save_pretrained(tmp_path / "longer")
    longer = ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "longer"))
    base = load_base(longer)
    before = logits(base.model)
    plan = plan_adapter(base.model, arguments_of(method), new_token_ids=base.new_token_ids, total_steps=50)
    model = wrap(base.model, plan)
    assert (logits(model) - before).abs().max() < 1e-5
    perturb(model)
    ids = torch.tensor([[0, 25, 9, 4, 26, 13, 20, 2]])
    trained = model.eval()(input_ids=ids).logits
    save_adapter(model, tmp_path / "adapter", base_name="base")
    reloaded = load_adapter(load_base(longer).model, tmp_path / "adapter").eval()
    assert torch.equal(reloaded(input_ids=ids).logits, trained)


def test_rows_of_new_tokens_beside_another_method_are_refused(tmp_path: Path) -> None:
    letter_tokenizer(extra=["<new1>"]).save_pretrained(tmp_path / "longer")
    folder = save_base(tmp_path / "base", "bert")
    base = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "longer")))
    with pytest.raises(
        AdapterError, match=r"vera cannot train the rows of new tokens\. Use lora, adalora or trainable"
    ):
        plan_adapter(base.model, arguments_of("vera"), new_token_ids=base.new_token_ids)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("lora", {}, "LoRA, rank 8, alpha 16"),
        ("lora", {"use_dora": True, "use_rslora": True, "lora_r": 4}, "LoRA (rsLoRA, DoRA), rank 4, alpha 16"),
        ("lora", {"init_lora_weights": "pissa"}, "LoRA (PiSSA), rank 8, alpha 16"),
        ("boft", {}, "BOFT"),
        ("boft", {"boft_block_size": 8}, "BOFT, boft_block_size 8"),
        ("hira", {"r": 4, "hira_dropout": 0.1}, "HiRA, r 4, hira_dropout 0.1"),
    ],
)
def test_a_card_names_the_method_with_what_was_chosen(method: str, options: dict[str, Any], text: str) -> None:
    assert describe_method(plan_adapter(tiny_model("bert"), arguments_of(method, **options)).config) == text


def test_a_start_by_data_or_of_loftq_reaches_the_configuration(tmp_path: Path) -> None:
    model = tiny_model("bert")
    for start in ("eva", "corda", "lora_ga", "pissa_niter_4"):
        assert plan_adapter(model, arguments_of("lora", init_lora_weights=start)).config.init_lora_weights == start
    eva = plan_adapter(model, arguments_of("lora", init_lora_weights="eva", eva_config={"rho": 1.5})).config
    assert eva.eva_config.rho == 1.5
    nf4 = load_base_of_kind(save_tiny_base(tmp_path, layers=1), "nf4")
    assert plan_adapter(nf4, arguments_of("lora", init_lora_weights="loftq")).config.init_lora_weights == "loftq"


def test_the_kind_of_a_base_is_seen_by_its_layers(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path, layers=1)
    assert [loaded_kind(load_base_of_kind(folder, base)) for base in BASES] == list(BASES)
