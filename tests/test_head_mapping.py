"""Checkpoints whose head, or all of whose weights, have other names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, ElectraForPreTraining, ModernBertForSequenceClassification

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import ModelError
from peft_mlm.head_mapping import open_checkpoint, rename_checkpoint
from peft_mlm.merging import is_tied, merge_adapter
from peft_mlm.model import Base, load_base
from tests.tiny import MODEL_TYPES, letter_tokenizer, perturb, same, save_base, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
# The same head by the names of each family: dense, norm, bias of the decoder.
SPELLINGS = {
    "BERT": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "RoBERTa": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "fairseq": ("encoder.lm_head.dense", "encoder.lm_head.layer_norm", "encoder.lm_head.bias"),
    "ALBERT": ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    "ELECTRA": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    "DistilBERT": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    "DeBERTa": ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head.bias"),
    "wrapped": ("module.model.lm_head.dense", "module.model.lm_head.layer_norm", "module.model.lm_head.bias"),
}
BERT_HEAD = {
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions.bias": "lm_head.bias",
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        given: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return given


def load(folder: Path, **changes: object) -> Base:
    return load_base(ModelArguments(model_name_or_path=str(folder), **changes))  # type: ignore[arg-type]


def plain_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForMaskedLM.from_pretrained(folder))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rename(folder: Path, names: dict[str, str]) -> None:
    """Rename by the longest beginning that is in `names`."""

    def new(name: str) -> str:
        starts = sorted((start for start in names if name.startswith(start)), key=len)
        return names[starts[-1]] + name.removeprefix(starts[-1]) if starts else name

    rewrite(folder, lambda t: {new(name): tensor for name, tensor in t.items()})


def head_names(folder: Path, model_type: str) -> dict[str, str]:
    """The checkpoint's head tensors -> dense, norm, or bias (of the decoder)."""
    model = tiny_model(model_type)
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in encoder}
    parts = {}
    for name in set(load_file(folder / "model.safetensors")) & names:
        owner = model.get_submodule(name.rpartition(".")[0])
        parts[name] = "dense" if isinstance(owner, torch.nn.Linear) else "norm"
        if model.get_parameter(name).shape == (25,):
            parts[name] = "bias"
    return parts


# ModernBERT's head has no biases, RemBERT's decoder is no matrix of the embeddings: their own tests are below.
WITH_FIVE_TENSORS = [t for t in MODEL_TYPES if t not in ("modernbert", "rembert")]
PAIRS = {("bert", spelling) for spelling in SPELLINGS} | {("nomic_bert", "BERT")}
PAIRS |= {(t, list(SPELLINGS)[i % len(SPELLINGS)]) for i, t in enumerate(WITH_FIVE_TENSORS)}


@pytest.mark.parametrize(("model_type", "spelling"), sorted(PAIRS))
def test_a_head_of_another_family_is_loaded_by_role(model_type: str, spelling: str, tmp_path: Path) -> None:
    """Each type's own head, written down by the names of another family."""
    folder = save_base(tmp_path / "base", model_type)
    expected = plain_logits(folder)
    dense, norm, bias = SPELLINGS[spelling]
    theirs = {"dense": dense, "norm": norm}
    names = {
        name: bias if part == "bias" else f"{theirs[part]}.{name.rpartition('.')[2]}"
        for name, part in head_names(folder, model_type).items()
    }
    assert len(names) == 5
    if set(names) == set(names.values()):
        return
    rename(folder, names)
    base = load(folder)
    assert same(logits(base.model), expected)
    assert base.fresh_parameters == ()
    assert is_tied(base.model)
    assert base.renamed_weights
    for name in set(names.values()) - set(names):
        assert any(f"{name} to " in notice for notice in base.notices), name


@pytest.mark.parametrize("model_type", ["modernbert", "rembert"])
def test_a_head_without_biases_or_with_a_decoder_of_its_own_is_loaded(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    expected = plain_logits(folder)
    rename(folder, {"head.": "lm_head.", "decoder": "lm_head.decoder", "cls.predictions": "predictions"})
    base = load(folder)
    assert base.fresh_parameters == ()
    assert base.renamed_weights
    assert same(logits(base.model), expected)


@pytest.mark.parametrize("model_type", ["bert", "nomic_bert"])
def test_a_model_with_a_mapped_head_is_saved_and_merged_under_its_own_names(model_type: str, tmp_path: Path) -> None:
    """transformers' own renaming at load is turned round at saving, so that the head would be lost again."""
    folder = save_base(tmp_path / "base", model_type)
    own_names = set(load_file(folder / "model.safetensors"))
    rename(folder, BERT_HEAD)
    rename(folder, {"cls.predictions.transform.layer_norm": "lm_head.layer_norm"})
    base = load(folder)
    base.model.save_pretrained(tmp_path / "saved")
    assert same(plain_logits(tmp_path / "saved"), logits(base.model))
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == own_names
    model = wrap(base.model, plan_adapter(base.model, PEFTArguments(use_lora=True)))
    perturb(model)
    trained = logits(model)
    merge_adapter(model, letter_tokenizer(), tmp_path / "merged")
    assert (plain_logits(tmp_path / "merged") - trained).abs().max() < 1e-5


def test_old_names_of_a_norm_and_a_second_copy_of_the_bias_are_understood(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    expected = plain_logits(folder)
    rename(folder, BERT_HEAD)
    rename(
        folder,
        {"lm_head.layer_norm.weight": "lm_head.LayerNorm.gamma", "lm_head.layer_norm.bias": "lm_head.LayerNorm.beta"},
    )
    rewrite(folder, lambda t: {**t, "lm_head.decoder.bias": t["lm_head.bias"].clone()})
    assert same(logits(load(folder).model), expected)


def test_the_matrix_of_a_mapped_head_stays_apart_if_it_is_another_than_the_embeddings(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    rename(folder, BERT_HEAD)
    matrix = "bert.embeddings.word_embeddings.weight"
    rewrite(folder, lambda t: {**t, "lm_head.decoder.weight": t[matrix].clone()})
    tied = load(folder)
    assert is_tied(tied.model)
    rewrite(folder, lambda t: {**t, "lm_head.decoder.weight": t[matrix] * 2})
    apart = load(folder)
    assert not is_tied(apart.model)
    assert apart.model.config.tie_word_embeddings is False
    bias = apart.model.get_output_embeddings().bias
    assert torch.allclose(logits(apart.model) - bias, (logits(tied.model) - bias) * 2, atol=1e-4)


def tensors(**modules: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of weight and bias (or of one of them, if it is named) of modules, `__` for a dot."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, shape in modules.items():
        name = module.replace("__", ".")
        if name.endswith((".weight", ".bias")):
            shapes[name] = shape
        else:
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


LM_HEAD = {"lm_head__dense": (32, 32), "lm_head__layer_norm": (32,)}
NOT_MASKED_LM_HEADS = {
    "discriminator": tensors(
        discriminator_predictions__dense=(32, 32), discriminator_predictions__dense_prediction=(1, 32)
    ),
    "replaced token detection": tensors(
        mask_predictions__dense=(32, 32), mask_predictions__LayerNorm=(32,), mask_predictions__classifier=(1, 32)
    ),
    "classifier": tensors(classifier__dense=(32, 32), classifier__norm=(32,), classifier__out_proj=(25, 32)),
    "pooler": tensors(bert__pooler__dense=(32, 32)),
    "next sentence": tensors(cls__seq_relationship=(2, 32)),
    "regression of 25 values": tensors(
        regression__dense=(32, 32), regression__LayerNorm=(32,), regression__decoder=(25, 32)
    ),
    "ModernBERT's classifier": tensors(head__dense=(32, 32), head__norm=(32,), classifier=(25, 32)),
    "head without a bias": tensors(**LM_HEAD, lm_head__decoder__weight=(25, 32)),
    "head without a norm": tensors(lm_head__dense=(32, 32), lm_head__bias=(25,)),
    "head of another width": tensors(lm_head__dense=(16, 32), lm_head__layer_norm=(16,), lm_head__bias=(25,)),
    "head with more parts": tensors(**LM_HEAD, lm_head__bias=(25,), lm_head__decoder__bias=(25,)),
}


@pytest.mark.parametrize("kind", NOT_MASKED_LM_HEADS)
@pytest.mark.parametrize("model_type", ["bert", "electra", "esm"])
def test_what_is_no_complete_masked_lm_head_is_never_taken_for_one(kind: str, model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    own = head_names(folder, model_type)
    if own.keys() & NOT_MASKED_LM_HEADS[kind].keys():
        return  # these are that type's own names
    extra = {name: torch.randn(shape) for name, shape in NOT_MASKED_LM_HEADS[kind].items()}
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name not in own} | extra)
    base = load(folder)
    assert set(base.fresh_parameters) == set(own)
    assert not base.renamed_weights
    for parameter in base.model.parameters():
        assert not any(torch.equal(parameter, tensor) for tensor in extra.values())


@pytest.mark.parametrize("kind", ["head without a bias", "head of another width", "head with more parts"])
def test_a_head_that_does_not_fit_is_named_with_the_reason(kind: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    own = head_names(folder, "bert")
    extra = {name: torch.randn(shape) for name, shape in NOT_MASKED_LM_HEADS[kind].items()}
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name not in own} | extra)
    said = " ".join(load(folder).notices)
    reason = {
        "head without a bias": "it has no decoder.bias",
        "head of another width": r"the shape of lm_head.dense.\w+ is not",
        "head with more parts": "lm_head.bias and lm_head.decoder.bias differ",
    }[kind]
    assert re.search(rf"another masked LM head \(.*lm_head\.dense\.weight.*\), which is not used: {reason}", said), said


def test_of_two_heads_none_is_taken(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    rename(folder, BERT_HEAD)
    rewrite(folder, lambda t: t | {f"encoder.{n}": v + 1 for n, v in t.items() if n.startswith("lm_head")})
    base = load(folder)
    assert not base.renamed_weights
    assert len(base.fresh_parameters) == 5
    assert any("more than one masked LM head" in notice for notice in base.notices)


def test_a_head_that_stands_partly_under_the_models_own_names_is_not_mixed(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    dense = "cls.predictions.transform.dense.weight"
    rewrite(
        folder,
        lambda t: (
            t | {BERT_HEAD[k] + n.removeprefix(k): v + 1 for k in BERT_HEAD for n, v in t.items() if n.startswith(k)}
        ),
    )
    assert load(folder).notices == (
        f"{folder} holds weights that a bert masked LM has no place for: lm_head.bias, lm_head.dense.bias, "
        "lm_head.dense.weight, lm_head.layer_norm.bias, lm_head.layer_norm.weight.",
    )
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if name != dense})
    base = load(folder)
    assert base.fresh_parameters == (dense,)
    assert any("under the model's own name too" in notice for notice in base.notices)


def test_real_checkpoints_with_another_head_stay_fresh(tmp_path: Path) -> None:
    for cls, model_type in ((ElectraForPreTraining, "electra"), (ModernBertForSequenceClassification, "modernbert")):
        folder = tmp_path / model_type
        cls(tiny_model(model_type).config).save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)
        base = load(folder)
        assert base.fresh_parameters
        assert not base.renamed_weights
        told = {"electra": "discriminator_predictions.dense.weight", "modernbert": "classifier.weight"}[model_type]
        assert any("no place for" in notice and told in notice for notice in base.notices)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model.module.", "0.auto_model."])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_a_whole_model_behind_a_prefix_is_loaded(prefix: str, model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    expected = plain_logits(folder)
    rename(folder, {"": prefix})
    base = load(folder)
    assert same(logits(base.model), expected)
    assert base.fresh_parameters == ()
    if (model_type, prefix) != ("modernbert", "model."):  # transformers takes a second "model." off by itself
        assert f"mapped, {prefix}" in base.notices[0]
    base.model.save_pretrained(tmp_path / "saved")
    assert same(plain_logits(tmp_path / "saved"), expected)


def test_an_encoder_behind_a_prefix_with_a_head_of_another_name_is_loaded(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    expected = plain_logits(folder)
    rename(folder, BERT_HEAD)
    rename(folder, {"": "module.", "lm_head": "module.lm_head"})
    base = load(folder)
    assert same(logits(base.model), expected)
    rename(folder, {"module.bert.": "module."})
    assert same(logits(load(folder).model), expected)


def test_an_encoder_of_another_architecture_is_refused_with_what_the_checkpoint_holds(tmp_path: Path) -> None:
    """RoBERTa's encoder has BERT's shapes, but other positions: a prefix alone does not make it one."""
    for prefix in ("roberta.", "student."):
        folder = save_base(tmp_path / prefix, "bert")
        rename(folder, {"bert.": prefix})
        with pytest.raises(ModelError, match=rf"lacks .* It holds instead: {prefix}embeddings"):
            load(folder)
    folder = save_base(tmp_path / "two", "bert")
    rewrite(folder, lambda t: {p + n: v.clone() for n, v in t.items() for p in ("module.", "model.")})
    with pytest.raises(ModelError, match="It holds instead"):
        load(folder)


def test_weights_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    rewrite(folder, lambda t: t | {"cls.predictions.transform.dense.weight": torch.zeros(16, 32)})
    said = r"cls\.predictions\.transform\.dense\.weight has the shape \(16, 32\), the config asks for \(32, 32\)"
    with pytest.raises(ModelError, match=said):
        load(folder)


def test_a_checkpoint_with_more_layers_than_its_config_is_said(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert any("no place for: bert.encoder.layer.1." in notice for notice in load(folder).notices)


def test_what_a_good_checkpoint_holds_beside_a_masked_lm_is_not_told(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    BertForPreTraining(tiny_model("bert").config).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path)
    assert base.notices == ()
    assert base.fresh_parameters == ()


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    expected = plain_logits(folder)
    rename(folder, BERT_HEAD)
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(str(folder)).shapes == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert same(logits(load(folder).model), expected)


def test_a_checkpoint_that_lies_in_the_cache_of_the_hub_is_looked_at_there(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    rename(folder, BERT_HEAD)
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--org--base"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("org/base", cache_dir=str(tmp_path / "cache"), revision="main", token=None)
    model = tiny_model("bert")
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith("cls.")]
    assert rename_checkpoint(model, missing, checkpoint).names["lm_head.bias"] == "cls.predictions.bias"
