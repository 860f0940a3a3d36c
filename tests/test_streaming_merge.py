"""An adapter merged file by file is the built model's merge, bit by bit; what is not sure to be is built."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from peft_mlm.arguments import ModelArguments
from peft_mlm.checkpoint import load_outline
from peft_mlm.errors import MergeError
from peft_mlm.fingerprint import base_fingerprint
from peft_mlm.merge_proof import precise_type
from peft_mlm.merging import built_merge
from peft_mlm.stream_plan import StreamPlan, plan_stream, stored_type
from peft_mlm.streaming_merge import streamed_merge
from tests.tiny import letter_tokenizer, perturb, save_base, save_encoder, tiny_model

TARGETS = ["query", "value", "intermediate.dense"]
SHARDED = ("bert", "modernbert", "roberta")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.*value": 3}},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "modules": {"modules_to_save": ["cls.predictions.transform.dense", "LayerNorm"]},
    "tokens": {"trainable_token_indices": [5, 24]},
    "tokens and dora": {"trainable_token_indices": {"word_embeddings": [7]}, "use_dora": True},
    "embedding": {"target_modules": ["position_embeddings", "query"]},
}


def save_adapter(base: Path, folder: Path, config: Any) -> Path:
    model = AutoModelForMaskedLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        perturb(adapted)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def lora(base: Path, folder: Path, **options: Any) -> Path:
    return save_adapter(base, folder, LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))


def plan(base: Path, adapter: Path) -> StreamPlan | str:
    arguments = ModelArguments(model_name_or_path=str(base))
    return plan_stream(adapter, arguments, load_outline(arguments))


def streamed(base: Path, adapter: Path, folder: Path, dtype: str = "float32") -> Path:
    planned = plan(base, adapter)
    assert isinstance(planned, StreamPlan), planned
    folder.mkdir()
    streamed_merge(planned, dtype)(folder)
    return folder


def built(base: Path, adapter: Path, folder: Path, dtype: str = "float32") -> Path:
    model = AutoModelForMaskedLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    adapted.to(precise_type(adapted))
    built_merge(adapted, dtype)(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def rewrite(base: Path, change: Any) -> None:
    file = base / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_config_are_those_of_the_built_model(case: str, dtype: str, bert: Path, tmp_path: Path) -> None:
    adapter = lora(bert, tmp_path / "adapter", **CASES[case])
    ours, theirs = (way(bert, adapter, tmp_path / way.__name__, dtype) for way in (streamed, built))
    assert same(weights(ours), weights(theirs))
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert not same(weights(ours), {n: w.to(getattr(torch, dtype)) for n, w in weights(bert).items()})


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_shards_stay_shards_in_every_type(stored: str, tmp_path: Path) -> None:
    for model_type in SHARDED:
        base = tmp_path / model_type
        tiny_model(model_type).to(getattr(torch, stored)).save_pretrained(base, max_shard_size="12KB")
        letter_tokenizer().save_pretrained(base)
        files = {file.name for file in base.glob("*.safetensors")}
        assert len(files) > 2
        assert stored_type(ModelArguments(model_name_or_path=str(base))) == stored
        adapter = lora(base, base / "adapter", target_modules="all-linear", exclude_modules=["decoder"])
        for dtype in sorted({stored, "float32"}):
            ours = streamed(base, adapter, tmp_path / f"{model_type}{dtype}", dtype)
            theirs = built(base, adapter, tmp_path / f"{model_type}{dtype}2", dtype)
            assert {file.name for file in ours.glob("*.safetensors")} == files
            assert same(weights(ours), weights(theirs))
            loaded, told = AutoModelForMaskedLM.from_pretrained(ours, output_loading_info=True)
            assert loaded.dtype == getattr(torch, dtype)
            assert not told["missing_keys"]
            assert not told["unexpected_keys"]
            index = json.loads((ours / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(ours).values())


@pytest.mark.parametrize("case", ["dora", "lora bias", "tokens and dora"])
def test_layers_whose_parts_lie_in_several_files(case: str, tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "base", max_shard_size="4KB")  # weight and bias of a layer apart
    letter_tokenizer().save_pretrained(tmp_path / "base")
    adapter = lora(tmp_path / "base", tmp_path / "adapter", **CASES[case])
    theirs = weights(built(tmp_path / "base", adapter, tmp_path / "built"))
    assert same(weights(streamed(tmp_path / "base", adapter, tmp_path / "streamed")), theirs)


def test_an_error_in_one_of_many_files_is_that_of_the_merge(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "base", max_shard_size="4KB")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    adapter = lora(tmp_path / "base", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(name for name in tensors if "lora_B" in name)
    save_file(tensors | {first: tensors[first] * float("nan")}, adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError, match="not finite in float32"):
        streamed(tmp_path / "base", adapter, tmp_path / "merged")


def test_what_the_adapter_does_not_change_is_copied_as_it_is_and_what_the_model_lacks_is_kept(
    bert: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "bert")
    pooler = {"bert.pooler.dense.weight": torch.randn(32, 32), "bert.embeddings.position_ids": torch.arange(64)[None]}
    rewrite(base, lambda tensors: tensors | pooler)
    adapter = lora(base, tmp_path / "adapter")
    before, after = weights(base), weights(streamed(base, adapter, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 6
    assert all(any(f"{target}.weight" in name for target in TARGETS) for name in changed)
    assert after.keys() == before.keys() >= pooler.keys()


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()}  # fmt: skip


def wrapped_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{n}": t for n, t in tensors.items()}


def both_ends(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    decoder = tensors["bert.embeddings.word_embeddings.weight"].clone()
    return tensors | {"cls.predictions.decoder.weight": decoder}


@pytest.mark.parametrize("change", [old_names, wrapped_names, both_ends])
def test_old_names_wrapped_names_and_both_ends_of_a_tie_give_the_same_model(change: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert")
    adapter = lora(base, tmp_path / "adapter", trainable_token_indices=[6, 9])
    expected = weights(built(base, adapter, tmp_path / "built"))
    rewrite(base, change)
    ours = streamed(base, adapter, tmp_path / "ours")
    model, told = AutoModelForMaskedLM.from_pretrained(ours, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_that_only_the_adapter_holds_is_written(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base")
    model = AutoModelForMaskedLM.from_pretrained(base)
    model.cls.predictions.bias.data.normal_()
    adapter = lora(base, tmp_path / "adapter", modules_to_save=["cls.predictions.transform"])
    reason = plan(base, adapter)
    assert isinstance(reason, str)
    assert "does not hold cls.predictions.bias" in reason  # the one thing that stays at its start
    rewrite(base, lambda tensors: tensors | {"cls.predictions.bias": model.cls.predictions.bias.detach()})
    ours, theirs = (way(base, adapter, tmp_path / way.__name__) for way in (streamed, built))
    assert same(weights(ours), weights(theirs))


def test_the_fingerprint_read_from_the_files_is_that_of_the_loaded_model(bert: Path, tmp_path: Path) -> None:
    for stored in ("float32", "bfloat16"):
        base = tmp_path / stored
        tiny_model("bert").to(getattr(torch, stored)).save_pretrained(base)
        letter_tokenizer().save_pretrained(base)
        planned = plan(base, lora(base, base / "adapter"))
        assert isinstance(planned, StreamPlan)
        loaded = AutoModelForMaskedLM.from_pretrained(base, dtype=torch.float32)
        assert planned.base.fingerprint == base_fingerprint(loaded)


def test_weights_that_lie_the_other_way_round_are_merged_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's layers (Conv1D) hold (in, out); no masked LM of transformers has them."""
    config = GPT2Config(vocab_size=25, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    for name, options in (("plain", {}), ("dora", {"use_dora": True})):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **options))
        perturb(adapted)
        adapted.save_pretrained(tmp_path / name)
        with torch.device("meta"):
            outline = GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path / "base"))
        planned = plan_stream(tmp_path / name, ModelArguments(model_name_or_path=str(tmp_path / "base")), outline)
        assert isinstance(planned, StreamPlan), planned
        (tmp_path / f"{name}2").mkdir()
        streamed_merge(planned, "float32")(tmp_path / f"{name}2")
        merged = adapted.double().merge_and_unload().float().state_dict()
        given = weights(tmp_path / f"{name}2")
        assert all(torch.equal(given[n], merged[n]) for n in given)
        assert any("c_attn" in n and not torch.equal(given[n], weights(tmp_path / "base")[n]) for n in given)


def refused(base: Path, tmp_path: Path) -> dict[str, tuple[str, Any]]:
    adapter = tmp_path / "adapter"
    return {
        "another method": ("method LOHA", lambda: save_adapter(base, adapter, LoHaConfig(target_modules=["query"]))),
        "a start that edits the base": ("starts by pissa", lambda: lora(base, adapter, init_lora_weights="pissa")),
        "an option": ("option use_bdlora", lambda: with_config(lora(base, adapter), use_bdlora={"nblocks": 2})),
        "an option of tomorrow": ("option use_xyz", lambda: with_config(lora(base, adapter), use_xyz=True)),
        "a tied matrix": ("more than one place", lambda: lora(base, adapter, target_modules=["word_embeddings"])),
        "a tied matrix as a whole": ("more than one place", lambda: lora(base, adapter, modules_to_save=["decoder"])),
        "tied biases": ("more than one place", lambda: lora(base, adapter, bias="all")),
    }


def with_config(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return adapter


@pytest.mark.parametrize(
    "case",
    [
        "another method", "a start that edits the base", "an option", "an option of tomorrow", "a tied matrix",
        "a tied matrix as a whole", "tied biases",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_right_is_left_to_the_built_model(case: str, bert: Path, tmp_path: Path) -> None:
    said, make = refused(bert, tmp_path)[case]
    reason = plan(bert, make())
    assert isinstance(reason, str), reason
    assert said in reason


def test_bases_that_transformers_changes_while_loading_are_left_to_the_built_model(tmp_path: Path) -> None:
    nomic = save_base(tmp_path / "nomic", "nomic_bert")
    adapter = lora(nomic, tmp_path / "nomic_adapter", target_modules="all-linear", exclude_modules=["decoder"])
    assert "transformers converts" in str(plan(nomic, adapter))
    bert = save_base(tmp_path / "bert", "bert")
    adapter = lora(bert, tmp_path / "adapter")
    arguments = ModelArguments(model_name_or_path=str(bert), load_in_4bit=True)
    assert "dequantised" in str(plan_stream(adapter, arguments, load_outline(arguments)))
    assert "code of its own" in str(plan_stream(adapter, arguments, None))
    letter_tokenizer(["<new>"]).save_pretrained(bert)
    assert "new tokens" in str(plan(bert, adapter))
    letter_tokenizer().save_pretrained(bert)
    rewrite(bert, lambda tensors: {n: t + 1 if "decoder" in n else t for n, t in both_ends(tensors).items()})
    assert "two different ends" in str(plan(bert, adapter))


def test_rows_of_tokens_alone_are_merged(bert: Path, tmp_path: Path) -> None:
    config = TrainableTokensConfig(token_indices=[4, 11], target_modules=["word_embeddings"])
    adapter = save_adapter(bert, tmp_path / "adapter", config)
    ours, theirs = (way(bert, adapter, tmp_path / way.__name__) for way in (streamed, built))
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sum_beyond_the_type_is_refused(dtype: str, bert: Path, tmp_path: Path) -> None:
    adapter = lora(bert, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    factor = 1e3 if dtype == "float16" else 1e25
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match=f"not finite in {dtype}"):
        streamed(bert, adapter, tmp_path / "merged", dtype)
