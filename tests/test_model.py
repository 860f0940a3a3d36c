from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from peft_mlm.arguments import ModelArguments
from peft_mlm.errors import ModelError
from peft_mlm.merging import is_tied
from peft_mlm.model import (
    load_base,
    load_tokenizer,
    published_name,
    vocabulary_size,
)
from peft_mlm.positions import position_limit, resolve_max_seq_length
from tests.tiny import MODEL_TYPES, SIZES, letter_tokenizer, save_base, save_encoder, tiny_model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_position_limit_is_what_the_model_runs_with_and_no_more(model_type: str) -> None:
    model = tiny_model(model_type)
    limit = position_limit(model)
    assert limit is not None
    ids = torch.full((1, limit), 7)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[1] == limit
    table = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "num_embeddings")]
    if table:
        longer = torch.full((1, limit + 1), 7)
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_row_length_is_capped_by_the_positions_and_the_user_is_told() -> None:
    model, tokenizer = tiny_model("roberta"), letter_tokenizer()
    held = SIZES["max_position_embeddings"] - 2
    assert position_limit(model) == held
    assert resolve_max_seq_length(30, model, tokenizer) == (30, None)
    length, notice = resolve_max_seq_length(512, model, tokenizer)
    assert length == held
    assert notice is not None
    assert "512" in notice
    assert resolve_max_seq_length(None, model, tokenizer) == (held, None)
    tokenizer.model_max_length = 20
    assert resolve_max_seq_length(None, model, tokenizer) == (20, None)


def test_a_complete_checkpoint_has_nothing_fresh_and_loads_in_float32(base_folder: Path, tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(base_folder)))
    assert (base.fresh_parameters, base.new_token_ids, base.notices) == ((), (), ())
    AutoModelForMaskedLM.from_pretrained(base_folder).to(torch.bfloat16).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_base(ModelArguments(model_name_or_path=str(tmp_path))).model.dtype == torch.float32
    assert load_base(ModelArguments(model_name_or_path=str(tmp_path), dtype="auto")).model.dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "albert", "esm", "modernbert"])
def test_an_encoder_without_head_is_found_out(model_type: str, tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(save_encoder(tmp_path, model_type))))
    head = {n for n, _ in base.model.named_parameters()} - {
        f"{base.model.base_model_prefix}.{n}" for n, _ in base.model.base_model.named_parameters()
    }
    assert set(base.fresh_parameters) == head


def test_a_checkpoint_that_lacks_encoder_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_base(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layer\.1\.output\.dense\.weight"):
        load_base(ModelArguments(model_name_or_path=str(tmp_path)))


def longer_tokenizer(folder: Path) -> str:
    letter_tokenizer(extra=["<one>", "<two>"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "modernbert", "esm", "deberta-v2"])
def test_embeddings_grow_with_the_tokenizer_and_stay_tied(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    arguments = ModelArguments(model_name_or_path=str(folder), tokenizer_name=longer_tokenizer(tmp_path / "longer"))
    base, again = load_base(arguments), load_base(arguments)
    old = load_base(ModelArguments(model_name_or_path=str(folder)))
    assert base.new_token_ids == (25, 26)
    assert base.tokenizer_changed
    assert "2 tokens more" in base.notices[0]
    assert is_tied(base.model) == is_tied(old.model)
    ids = torch.tensor([[0, 25, 9, 26, 2]])
    assert base.model(input_ids=ids).logits.shape[-1] == 27
    assert torch.equal(base.model(input_ids=ids).logits, again.model(input_ids=ids).logits)
    known = torch.tensor([[0, 7, 9, 4, 2]])
    assert torch.equal(base.model(input_ids=known).logits[..., :25], old.model(input_ids=known).logits)


def test_embeddings_are_never_shrunk(tmp_path: Path) -> None:
    folder = save_base(tmp_path, "bert", vocab_size=40)
    base = load_base(ModelArguments(model_name_or_path=str(folder)))
    assert base.model.get_input_embeddings().weight.shape[0] == 40
    assert base.new_token_ids == ()


def test_a_longer_tokenizer_is_refused_where_nothing_holds_its_rows(base_folder: Path, tmp_path: Path) -> None:
    arguments = ModelArguments(model_name_or_path=str(base_folder), tokenizer_name=longer_tokenizer(tmp_path))
    with pytest.raises(ModelError, match=r"ids up to 26, the model .* has 25 rows"):
        load_base(arguments, may_grow=False)


def test_a_tokenizer_of_another_vocabulary_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Its ids would pick embeddings of other tokens, without an error."""
    tokenizer = letter_tokenizer()
    other = tokenizer.backend_tokenizer.to_str().replace('"A":5', '"A":6', 1).replace('"B":6', '"B":5', 1)
    (tmp_path / "tokenizer.json").write_text(other)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(other)
    changed = load_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)))
    assert changed.convert_tokens_to_ids("A") == 6
    with pytest.raises(ModelError, match="nor an extension of it: id 5 is 'A' for the base and 'B'"):
        load_base(ModelArguments(model_name_or_path=str(base_folder), tokenizer_name=str(tmp_path)))


def test_from_scratch_takes_vocabulary_and_special_ids_from_the_tokenizer(base_folder: Path) -> None:
    arguments = ModelArguments(
        model_type="bert",
        tokenizer_name=str(base_folder),
        config_overrides="hidden_size=48,num_hidden_layers=1,num_attention_heads=4,intermediate_size=64",
    )
    base = load_base(arguments)
    config = base.model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (25, 48, 1)
    assert config.pad_token_id == base.tokenizer.pad_token_id == 1
    assert base.name_or_path is None
    assert base.fresh_parameters == ()
    with pytest.raises(ModelError, match="config_overrides"):
        load_base(replace(arguments, config_overrides="hidden_sise=48"))
    with pytest.raises(ModelError, match=r"num_attention_heads|number of attention heads"):
        load_base(replace(arguments, config_overrides="hidden_size=48,num_attention_heads=5"))
    with pytest.raises(ModelError, match="nosuch, which transformers has no masked language model for"):
        load_base(replace(arguments, model_type="nosuch"))


def broken_folder(tmp_path: Path, case: str, base_folder: Path) -> str:
    folder = tmp_path / "model"
    if case == "missing":
        return str(tmp_path / "nowhere")
    if case == "file":
        folder.write_text("weights")
        return str(folder)
    shutil.copytree(base_folder, folder)
    if case == "no_config":
        (folder / "config.json").unlink()
    elif case == "no_weights":
        (folder / "model.safetensors").unlink()
    elif case == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif case == "damaged":
        (folder / "model.safetensors").write_bytes(b"\0" * 100)
    elif case == "bad_config":
        (folder / "config.json").write_text("{")
    elif case == "not_mlm":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif case == "encoder_decoder":
        (folder / "config.json").write_text('{"model_type": "bart", "is_encoder_decoder": true}')
    elif case == "no_tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", "There is no folder"),
        ("file", "is a file"),
        ("no_config", "no config.json"),
        ("no_weights", "no weights"),
        ("pickle", "pickle"),
        ("damaged", "Cannot load the model"),
        ("bad_config", "Cannot load the"),
        ("not_mlm", "gpt2, which transformers has no masked language model for"),
        ("encoder_decoder", "encoder-decoder"),
        ("no_tokenizer", "Cannot load the tokenizer"),
    ],
)
def test_a_folder_that_cannot_serve_gives_one_sentence(case: str, said: str, tmp_path: Path, base_folder: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_base(ModelArguments(model_name_or_path=broken_folder(tmp_path, case, base_folder)))
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_name_gives_one_sentence() -> None:
    with pytest.raises(ModelError, match="Cannot load the model nobody/nothing on the hub or in the cache"):
        load_base(ModelArguments(model_name_or_path="nobody/nothing"))


def test_a_tokenizer_without_mask_token_is_refused(tmp_path: Path) -> None:
    backend = letter_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no mask_token"):
        load_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)))


def test_vocabulary_size_counts_rows_not_tokens() -> None:
    assert vocabulary_size(letter_tokenizer()) == 25
    assert vocabulary_size(letter_tokenizer(extra=["<x>"])) == 26


def test_published_name_keeps_hub_names_and_drops_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert published_name(str(tmp_path / "mine")) == "mine"
    assert published_name("org/model") == "org/model"
    assert published_name(None) is None
