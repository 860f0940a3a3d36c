"""A base in 4 or 8 bits computes what its numbers say, trains, reloads and merges; plain defaults beside it do not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, BitsAndBytesConfig

from peft_mlm.adaptation import adapt
from peft_mlm.adapter import count_parameters, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.base_memory import describe_memory
from peft_mlm.base_recipe import write_base_recipe
from peft_mlm.collator import from_tokenizer
from peft_mlm.config import read_arguments
from peft_mlm.data_passes import DataPass
from peft_mlm.errors import AdapterError, MergeError, ModelError
from peft_mlm.loading import load, load_target, resolve_target
from peft_mlm.merge_proof import probe_logits, probe_rows
from peft_mlm.merging import merge_adapter
from peft_mlm.model import load_base
from peft_mlm.quantization import (
    dequantise,
    dequantised_weight,
    is_quantised,
    quantised_layers,
    resolve_compute_dtype,
)
from tests.tiny import MODEL_TYPES, letter_tokenizer, perturb, same, save_base, tiny_model

# The 16 numbers of NF4, from the paper's appendix E (https://arxiv.org/abs/2305.14314), and those of FP4 (e2m1).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2], [0, 8, 8, 4, 20, 5, 4, 11, 2]])
FOUR: dict[str, Any] = {"load_in_4bit": True}
EIGHT: dict[str, Any] = {"load_in_8bit": True}
BERT = {"hidden_size": 64, "intermediate_size": 128}  # wide enough for bitsandbytes' bfloat16 kernels


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits).double()


def plain(folder: Path, **options: Any) -> Any:
    """What a script without this package loads."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    settings |= options or {"load_in_4bit": True}
    return AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    )


def reference(folder: Path, quantised: nn.Module) -> Any:
    """The plain float model, in whose layers the numbers of the quantised ones are put."""
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, layer in quantised_layers(quantised).items():
            model.get_submodule(name).weight.copy_(dequantised_weight(layer))  # type: ignore[operator]
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    out.float().pow(2).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def exact_in_training(model: nn.Module) -> None:
    """Let int8 layers round their weights alone, as they do in training on a CPU; dropout stays off."""
    for layer in quantised_layers(model).values():
        layer.train(isinstance(layer, Linear8bitLt))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bert"), "bert", **BERT)


@pytest.fixture(scope="module")
def stored(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a quantised checkpoint as plain transformers writes it: the dense layer of its head is quantised too."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("stored") / name
        config = BitsAndBytesConfig(**options)
        AutoModelForMaskedLM.from_pretrained(bert, dtype=dtype, quantization_config=config).save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_computes_trains_reloads_and_merges(model_type: str, kind: str, tmp_path: Path) -> None:
    if kind == "int8" and model_type not in ("bert", "distilbert", "electra", "esm", "modernbert", "deberta-v2"):
        pytest.skip("six heads and attentions stand for the rest")
    folder = save_base(tmp_path / "base", model_type)
    arguments = ModelArguments(str(folder), **(FOUR if kind == "nf4" else EIGHT))
    base = load_base(arguments)
    expected = reference(folder, base.model)
    encoder = {id(module) for module in expected.base_model.modules()}
    linears = {name: m for name, m in expected.named_modules() if isinstance(m, nn.Linear)}
    assert set(quantised_layers(base.model)) == {name for name, m in linears.items() if id(m) in encoder}
    float_names = set(linears) - set(quantised_layers(base.model))
    assert all(base.model.get_submodule(name).weight.dtype == torch.float32 for name in float_names)
    exact_in_training(base.model)
    assert (logits(base.model) - logits(expected)).abs().max() < 1e-5

    dense = next(name for name in float_names if linears[name] is not expected.get_output_embeddings())
    options = PEFTArguments(use_lora=True, modules_to_save=[dense])
    quantised, plan = base.model.eval(), plan_adapter(base.model, options)
    adapted = wrap(quantised, plan)
    same = wrap(expected, plan_adapter(expected, options))
    perturb(adapted)
    same.load_state_dict({n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}, strict=False)
    logits(adapted)  # an evaluation before training must not change what training does
    exact_in_training(adapted)
    given, right = gradients(adapted), gradients(same)
    assert given.keys() == right.keys()
    for name, gradient in right.items():
        assert (given[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    assert any("lora_B" in name for name in given)
    assert any("modules_to_save" in name for name in given)

    save_adapter(adapted, tmp_path / "adapter", base_name=str(folder))
    write_base_recipe(arguments, tmp_path / "adapter")
    again = load(str(tmp_path / "adapter"))
    assert torch.allclose(logits(again.model), logits(adapted.eval()), rtol=0, atol=1e-5)
    before = probe_logits(again.model, probe_rows(again.model.get_base_model(), again.tokenizer))
    plain_sum = load_target(resolve_target(str(tmp_path / "adapter")), dequantised=True)
    report = merge_adapter(plain_sum.model, again.tokenizer, tmp_path / "merged")
    assert report.max_abs_logit_diff < 1e-5
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    after = probe_logits(merged, probe_rows(merged, again.tokenizer))
    assert (before - after).abs().max() < (1e-4 if kind == "nf4" else 0.5)
    expected_logits = logits(same.eval())
    assert (logits(merged) - expected_logits).abs().max() < 1e-6 * max(10, expected_logits.abs().max())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "modernbert", "esm"])
def test_plain_transformers_quantises_the_head_and_cannot_train_it(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    model = plain(folder)
    encoder = {id(module) for module in model.base_model.modules()}
    head = [name for name, layer in quantised_layers(model).items() if id(layer) not in encoder]
    assert head
    with pytest.raises(RuntimeError, match="floating point"):
        get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=head, exclude_modules=head))
    again = plain(folder, load_in_4bit=True, llm_int8_skip_modules=["decoder"])
    assert set(head) <= set(quantised_layers(again))


def test_plain_peft_merges_a_quantised_adapter_into_another_model(bert: Path, tmp_path: Path) -> None:
    arguments = ModelArguments(str(bert), **FOUR)
    adapted = wrap(model := load_base(arguments).model, plan_adapter(model, PEFTArguments(use_lora=True)))
    perturb(adapted)
    save_adapter(adapted, tmp_path / "adapter", base_name=str(bert))
    write_base_recipe(arguments, tmp_path / "adapter")
    trained = logits(adapted)
    from peft import PeftModel

    into_float = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(bert), str(tmp_path / "adapter"))
    assert (logits(into_float.merge_and_unload().eval()) - trained).abs().max() > 1e-2
    with pytest.raises(MergeError, match="dequantise"):
        merge_adapter(adapted, letter_tokenizer(), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    into_bits = adapted.merge_and_unload()
    assert is_quantised(into_bits)
    assert (logits(into_bits) - trained).abs().max() > 1e-2
    right = load_target(resolve_target(str(tmp_path / "adapter")), dequantised=True).model.merge_and_unload()
    assert (logits(right) - trained).abs().max() < 1e-5


@pytest.mark.skipif(not has_avx512bf16(), reason="a CPU without bfloat16 instructions has one path only")
def test_plain_layers_that_were_evaluated_no_longer_train(bert: Path) -> None:
    model = plain(bert).eval()
    first = next(iter(quantised_layers(model).values()))
    inputs = torch.randn(3, 64)
    before = first(inputs.clone().requires_grad_())
    first(inputs)
    after = first(inputs)
    assert before.requires_grad
    assert (before - after).abs().max() > 1e-4
    first.bias = None
    leaf = inputs.clone().requires_grad_()
    with warnings.catch_warnings(action="ignore"):
        first.train()(leaf).sum().backward()
    assert leaf.grad is None
    ours = next(iter(quantised_layers(load_base(ModelArguments(str(bert), **FOUR)).model).values()))
    assert torch.equal(ours(inputs), ours(inputs.clone().requires_grad_()))
    leaf = inputs.clone().requires_grad_()
    ours.train()(leaf).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_numbers_are_scale_times_code(bert: Path, double: bool) -> None:
    base = load_base(ModelArguments(str(bert), **FOUR, bnb_4bit_use_double_quant=double)).model
    original = AutoModelForMaskedLM.from_pretrained(bert)
    for name, layer in quantised_layers(base).items():
        packed = layer.weight.data.flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        weight = original.get_submodule(name).weight
        scales = weight.detach().flatten().view(-1, 64).abs().amax(dim=1)
        expected = (torch.tensor(NF4)[codes].view(-1, 64) * scales[:, None]).view_as(weight)
        error = (dequantised_weight(layer) - expected).abs().max() / scales.max()
        assert error < (2e-2 if double else 1e-6), name  # scales in 8 bits are off by up to 1 in 127
        nearest = (weight.detach().view(-1, 64) / scales[:, None]).flatten()
        assert torch.equal((nearest[:, None] - torch.tensor(NF4)).abs().argmin(dim=1), codes)


def test_eight_bit_numbers_are_rounded_shares_of_the_row_s_largest(bert: Path) -> None:
    base = load_base(ModelArguments(str(bert), **EIGHT)).model
    original = AutoModelForMaskedLM.from_pretrained(bert)
    for when in ("before", "after"):  # the scales move from the weight to the layer at its first use
        for name, layer in quantised_layers(base).items():
            weight = original.get_submodule(name).weight.detach().half().float()
            scales = weight.abs().amax(dim=1, keepdim=True)
            difference = (dequantised_weight(layer) - weight).abs()
            assert (difference <= scales / 127 * 0.51).all(), (when, name)
        logits(base)


@pytest.mark.parametrize("kind", [FOUR, EIGHT])
def test_dequantising_leaves_a_plain_model_with_its_ties(bert: Path, kind: dict[str, Any], tmp_path: Path) -> None:
    base = load_base(ModelArguments(str(bert), **kind)).model
    exact_in_training(base)
    before, frozen = logits(base), [name for name, p in base.named_parameters() if not p.requires_grad]
    plain_model = dequantise(base.eval())
    assert not is_quantised(plain_model)
    assert (logits(plain_model) - before).abs().max() < 1e-5
    assert {p.dtype for p in plain_model.parameters()} == {torch.float32}
    assert [name for name, p in plain_model.named_parameters() if not p.requires_grad] == frozen
    assert plain_model.get_output_embeddings().weight is plain_model.get_input_embeddings().weight
    plain_model.double()
    plain_model.float().save_pretrained(tmp_path / "plain")
    assert same(logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "plain")), logits(plain_model))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_dequantising_does_not_round_to_the_type_of_the_checkpoint(stored: Callable[..., Path]) -> None:
    folder = stored("half", torch.bfloat16, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = load_base(ModelArguments(str(folder))).model
    expected = {name: dequantised_weight(layer) for name, layer in quantised_layers(base).items()}
    before = logits(base)
    assert (logits(dequantise(base)) - before).abs().max() < 1e-5
    theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    off = [(theirs.get_submodule(name).weight - weight).abs().max() for name, weight in expected.items()]
    assert max(off) > 1e-4


def test_the_numbers_do_not_depend_on_the_type_that_the_rest_is_held_in(bert: Path) -> None:
    full = load_base(ModelArguments(str(bert), **FOUR)).model
    half = load_base(ModelArguments(str(bert), **FOUR, dtype="bfloat16")).model
    for name, layer in quantised_layers(full).items():
        other = quantised_layers(half)[name]
        assert torch.equal(layer.weight.data, other.weight.data)
        assert torch.equal(dequantised_weight(layer), dequantised_weight(other))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForMaskedLM.from_pretrained(bert, dtype=torch.bfloat16, quantization_config=config)
    assert any(
        not torch.equal(dequantised_weight(layer), dequantised_weight(quantised_layers(theirs)[name]))
        for name, layer in quantised_layers(full).items()
    )
    types = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {t for name, t in types.items() if "LayerNorm" in name} == {torch.float32}
    assert {t for name, t in types.items() if "embeddings.weight" in name or "decoder" in name} == {torch.bfloat16}
    assert types["cls.predictions.transform.dense.weight"] == torch.bfloat16
    assert (logits(half) - logits(full)).abs().max() < 0.05 * logits(full).abs().max()


@pytest.mark.parametrize("model_type", ["bert", "esm", "modernbert", "deberta-v2", "electra"])
@pytest.mark.parametrize("quantised", [{}, FOUR])
def test_a_trained_head_is_float32_in_a_half_precision_base(
    model_type: str, quantised: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_base(tmp_path / "base", model_type)
    arguments = ModelArguments(str(folder), dtype="bfloat16", **quantised)
    model = load_base(arguments).model
    dense = next(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module not in model.base_model.modules()
    )
    adapted = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, modules_to_save=[dense])))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    perturb(adapted, scale=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients(adapted).values())
    save_adapter(adapted, tmp_path / "adapter", base_name=str(folder))
    write_base_recipe(arguments, tmp_path / "adapter")
    target = resolve_target(str(tmp_path / "adapter"))
    target.base.dtype = "bfloat16"
    assert same(logits(load_target(target).model), logits(adapted.eval()))


def test_moving_a_quantised_model_to_where_it_is_changes_nothing(bert: Path) -> None:
    for kind in (FOUR, EIGHT):
        model = load_base(ModelArguments(str(bert), **kind)).model
        adapted = wrap(model, plan_adapter(model, PEFTArguments(use_lora=True)))
        before = logits(adapted)
        assert same(logits(adapted.to("cpu")), before)


def test_a_parameter_in_four_bits_counts_as_one(bert: Path) -> None:
    counts = [count_parameters(load_base(ModelArguments(str(bert), **kind)).model)[1] for kind in ({}, FOUR, EIGHT)]
    assert counts == [sum(p.numel() for p in tiny_model("bert", **BERT).parameters())] * 3


def test_memory_is_what_the_tensors_take(bert: Path) -> None:
    base = load_base(ModelArguments(str(bert), **FOUR)).model
    layers = quantised_layers(base).values()
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    memory = describe_memory(base)
    assert memory["quantised"] == numbers // 2 + 4 * numbers // 64 + 16 * 4 * len(layers)
    assert memory["embeddings"] == 4 * 64 * (25 + 64 + 2)
    assert memory["head"] == 4 * (64 * 64 + 64 + 2 * 64 + 25)
    assert memory["total"] == sum(memory[part] for part in ("quantised", "embeddings", "head", "other"))
    assert memory["bfloat16"] * 2 == memory["float32"] == 4 * count_parameters(base)[1]
    eight = describe_memory(load_base(ModelArguments(str(bert), **EIGHT)).model)
    rows = sum(layer.out_features for layer in layers)
    assert eight["quantised"] == numbers + 4 * rows
    assert {part: eight[part] for part in ("embeddings", "head")} == {
        part: memory[part] for part in ("embeddings", "head")
    }
    assert base.get_memory_footprint() < memory["total"]  # transformers leaves the scales out


def test_the_hardware_chooses_the_type_to_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_compute_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolve_compute_dtype("auto", torch.device("cuda", 0)) is expected


def test_a_checkpoint_quantised_already_loads_as_it_is(stored: Callable[..., Path]) -> None:
    folder = stored("nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = load_base(ModelArguments(str(folder)))
    assert base.quantisation is not None
    assert (base.quantisation["bits"], base.quantisation["kind"]) == (4, "nf4")
    assert base.quantisation["quantised_head"] == ["cls.predictions.transform.dense"]
    assert base.fresh_parameters == ()
    assert isinstance(next(iter(quantised_layers(base.model).values())), Linear4bit)
    agreed = load_base(ModelArguments(str(folder), **FOUR))
    assert same(logits(agreed.model), logits(base.model))
    eight = load_base(ModelArguments(str(stored("int8", load_in_8bit=True))))
    assert eight.quantisation is not None
    assert (eight.quantisation["bits"], eight.quantisation["kind"]) == (8, "int8")
    for wanted, fault in (
        (EIGHT, "load_in_8bit (it is in 4 bits)"),
        ({**FOUR, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type fp4 (it is nf4)"),
        ({**FOUR, "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant True (it is False)"),
    ):
        with pytest.raises(ModelError) as caught:
            load_base(ModelArguments(str(folder), **wanted))
        assert fault in str(caught.value)


def test_what_a_quantised_checkpoint_cannot_do_is_said(stored: Callable[..., Path]) -> None:
    folder = str(stored("nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    rows = Dataset.from_dict({"input_ids": [[0, 5, 6, 2]]})
    data = DataPass(rows, from_tokenizer(letter_tokenizer()), 1, 0, torch.device("cpu"))
    needed = {"model_name_or_path": folder, "train_file": "a.txt", "output_dir": "out"}
    head = read_arguments(values={**needed, "use_lora": True, "modules_to_save": ["cls"]})
    with pytest.raises(AdapterError, match=r"cls\.predictions\.transform\.dense cannot be trained in full"):
        adapt(load_base(head.model), head, None, data=data, total_steps=1)
    whole = read_arguments(values=needed)
    with pytest.raises(AdapterError, match="add --use_lora"):
        adapt(load_base(whole.model), whole, None, data=data, total_steps=1)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "torchao"])
def test_other_formats_are_refused_with_a_sentence(method: str, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    config = json.loads((bert / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=f"is quantised by {method}, which adapters"):
        load_base(ModelArguments(str(folder)))


def test_a_type_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "squeezebert", "squeezebert")
    with pytest.raises(ModelError, match="no linear layer that bitsandbytes can quantise"):
        load_base(ModelArguments(str(folder), **FOUR))
