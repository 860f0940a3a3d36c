from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

from peft_mlm.adapter import (
    check_adapter_folder,
    count_parameters,
    load_adapter,
    plan_adapter,
    save_adapter,
    wrap,
)
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError, MergeError
from peft_mlm.heads import plan_fresh_head, tied_parameters, untied_modules
from peft_mlm.loading import load
from peft_mlm.merging import is_tied, merge_adapter
from peft_mlm.model import load_base
from peft_mlm.targets import encoder_linears
from tests.tiny import MODEL_TYPES, letter_tokenizer, perturb, save_base, save_encoder, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
LORA = PEFTArguments(use_lora=True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_default_targets_are_encoder_linears_that_every_prediction_depends_on(model_type: str) -> None:
    model = tiny_model(model_type)
    targets = encoder_linears(model)
    tied = tied_parameters(model)
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    assert targets
    model.zero_grad()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.pow(2).sum().backward()
    for name in targets:
        weight = model.get_submodule(name).weight
        assert id(weight) in encoder, name
        assert id(weight) not in tied, name
        assert weight.grad is not None, name
        assert torch.count_nonzero(weight.grad) > 0, name
    left_out = {
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in {id(model.get_submodule(t).weight) for t in targets}
    }
    for name in left_out:
        weight = model.base_model.get_submodule(name).weight
        assert weight.grad is None or id(weight) in tied, f"{name} gets a gradient and is no target"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_adapter_starts_as_the_base_and_reloads_and_merges_as_trained(model_type: str, tmp_path: Path) -> None:
    base = tiny_model(model_type)
    before = logits(base)
    base.save_pretrained(tmp_path / "base")
    model = wrap(base, plan_adapter(base, LORA))
    # not 0: where a tensor lies in memory may change the order of a sum
    assert difference(logits(model), before) < 1e-5
    perturb(model)
    trained = logits(model)
    assert difference(trained, before) > 1e-3
    save_adapter(model, tmp_path / "adapter", base_name="base")

    plain = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert difference(logits(plain), trained) < 1e-5
    ours = load_adapter(AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert difference(logits(ours), trained) < 1e-5

    tied = is_tied(ours)
    report = merge_adapter(ours, letter_tokenizer(), tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert difference(logits(merged.double()), logits(plain.double())) < 1e-5
    assert report.max_abs_logit_diff < 1e-5 * max(1, report.max_abs_logit)
    assert is_tied(merged) == tied
    assert not [name for name, _ in merged.named_modules() if "lora" in name]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "modernbert", "esm", "deberta-v2"])
def test_fresh_head_is_trained_shipped_and_the_same_after_reloading(model_type: str, tmp_path: Path) -> None:
    """With plain PEFT the head is random, frozen and not in the adapter: each load gives another model."""
    folder = save_encoder(tmp_path / "encoder", model_type)
    torch.manual_seed(1)
    base = load_base(ModelArguments(model_name_or_path=str(folder)))
    assert base.fresh_parameters
    assert base.model.base_model_prefix not in {name.split(".")[0] for name in base.fresh_parameters}
    plan = plan_adapter(base.model, LORA, fresh_parameters=base.fresh_parameters)
    assert plan.trained_modules
    model = wrap(base.model, plan)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for module in plan.trained_modules:
        assert any(module in name for name in trainable), module
    perturb(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter", base_name="encoder")
    assert is_tied(model) == is_tied(tiny_model(model_type))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * 1.5 * count_parameters(model)[0] + 20_000

    torch.manual_seed(99)  # another random head
    again = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(folder), tmp_path / "adapter")
    assert difference(logits(again), trained) < 1e-5
    report = merge_adapter(again, letter_tokenizer(), tmp_path / "merged")
    assert report.max_abs_logit_diff < 1e-5
    assert difference(logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")), trained) < 1e-5


def test_fresh_bias_of_a_tied_decoder_stays_at_zero_and_a_random_one_is_refused(tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(save_encoder(tmp_path / "encoder"))))
    head = plan_fresh_head(base.model, base.fresh_parameters)
    assert head.left_at_zero == ("cls.predictions.bias",)
    with torch.no_grad():
        base.model.cls.predictions.bias[3] = 0.5
    with pytest.raises(AdapterError, match=r"cls\.predictions\.bias"):
        plan_fresh_head(base.model, base.fresh_parameters)


def test_modules_to_save_leaves_the_tie_whole(tmp_path: Path) -> None:
    """With plain PEFT, training `cls` copies the decoder, cuts the tie, and loses the decoder's bias on reload."""
    base = tiny_model("bert")
    base.save_pretrained(tmp_path / "base")
    plan = plan_adapter(base, PEFTArguments(use_lora=True, modules_to_save=["cls"]))
    assert plan.trained_modules == ("cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense")
    assert any("tied decoder stays" in notice for notice in plan.notices)
    model = wrap(base, plan)
    perturb(model)
    trained = logits(model)
    merge_adapter(model, letter_tokenizer(), tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert is_tied(merged)
    assert difference(logits(merged), trained) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_target_modules": ["qury"]}, r"no layer is named qury\. Layers .*attention\.self\.query"),
        ({"lora_target_modules": ["word_embeddings"]}, "embedding and the decoder at once"),
        ({"lora_target_modules": ["decoder"]}, "embedding and the decoder at once"),
        ({"lora_target_modules": ["query", "(unclosed"]}, "regular expression"),
        ({"lora_exclude_modules": ["nothing"]}, "nothing is no target"),
        ({"layers_to_transform": [7]}, r"no layer \[7\]; there are 0 to 1"),
        ({"modules_to_save": ["heads"]}, "no module is named heads"),
        ({"modules_to_save": ["word_embeddings"]}, "tied"),
        ({"rank_pattern": {"qury": 4}}, "qury matches no target"),
        ({"rank_pattern": {"query": 0}}, "must be a positive number"),
        ({"rank_pattern": {"query": 2.5}}, "must be a positive number"),
    ],
)
def test_an_option_that_fits_no_layer_is_refused_with_the_real_names(options: dict[str, object], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        plan_adapter(tiny_model("bert"), PEFTArguments(use_lora=True, **options))


def test_named_targets_patterns_and_layers_are_taken_as_given() -> None:
    model = tiny_model("bert")
    options = {"lora_target_modules": ["query", "value"], "layers_to_transform": [1], "rank_pattern": {"value": 2}}
    adapted = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4, **options)))
    ranks = {
        re.sub(r".*layer\.", "", name): module.weight.shape[0]
        for name, module in adapted.named_modules()
        if name.endswith("lora_A.default")
    }
    assert ranks == {
        "1.attention.self.query.lora_A.default": 4,
        "1.attention.self.value.lora_A.default": 2,
    }


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}],
)
def test_variants_reach_peft_and_start_as_the_base(options: dict[str, object]) -> None:
    model = tiny_model("bert")
    before = logits(model)
    plan = plan_adapter(model, PEFTArguments(use_lora=True, **options))
    for name, value in options.items():
        assert getattr(plan.config, name) == value
    assert difference(logits(wrap(model, plan)), before) < 1e-5


def test_what_is_shipped_names_no_local_path(tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(save_base(tmp_path / "secret_place" / "base"))))
    model = wrap(base.model, plan_adapter(base.model, LORA))
    save_adapter(model, tmp_path / "adapter", base_name="base", base_revision="abc")
    for file in (tmp_path / "adapter").iterdir():
        assert b"secret_place" not in file.read_bytes(), file.name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", "abc")


def test_adapter_for_another_model_or_in_a_pickle_is_refused(tmp_path: Path) -> None:
    model = tiny_model("roberta")
    save_adapter(wrap(model, plan_adapter(model, LORA)), tmp_path / "adapter", base_name="base")
    for other in (tiny_model("distilbert"), tiny_model("roberta", hidden_size=48)):
        with pytest.raises(AdapterError, match="does not fit the base model"):
            load_adapter(other, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        check_adapter_folder(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    (tmp_path / "adapter" / "adapter_model.bin").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="damaged"):
        check_adapter_folder(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="holds no adapter"):
        check_adapter_folder(tmp_path)


def test_untied_modules_are_the_smallest_parts_without_a_tied_weight() -> None:
    assert untied_modules(tiny_model("roberta"), "lm_head") == ["lm_head.dense", "lm_head.layer_norm"]
    assert untied_modules(tiny_model("roberta"), "lm_head.decoder") == []


def test_a_merge_beyond_what_float16_holds_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e6
    adapted = wrap(model, plan_adapter(model, LORA))
    with pytest.raises(MergeError, match="not finite in float16"):
        merge_adapter(adapted, letter_tokenizer(), tmp_path / "merged", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_head_trained_beside_ln_tuning_is_merged_with_it(tmp_path: Path) -> None:
    base = tiny_model("bert")
    arguments = PEFTArguments(peft_method="ln_tuning", modules_to_save=["cls.predictions.transform"])
    model = wrap(base, plan_adapter(base, arguments))
    perturb(model)
    expected = logits(model)
    merge_adapter(model, letter_tokenizer(), tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert difference(logits(merged), expected) < 1e-5


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_trained_biases_beside_new_tokens_are_loaded_as_trained(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    arguments = ModelArguments(model_name_or_path=str(folder), add_tokens=["heavy", "light"])
    loaded = load_base(arguments)
    options = PEFTArguments(use_lora=True, peft_config={"bias": "all"})
    plan = plan_adapter(loaded.model, options, new_token_ids=loaded.new_token_ids)
    model = wrap(loaded.model, plan)
    perturb(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", base_name=str(folder), tokenizer=loaded.tokenizer)
    again = load(str(tmp_path / "adapter"), any_base=True).model
    assert difference(logits(again), expected) < 1e-5
