"""Rows for new tokens: grown for every model type, trained and shipped as rows, the same after each way of loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, PreTrainedModel

from peft_mlm.adapter import load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.merging import is_tied, merge_adapter
from peft_mlm.model import Base, load_base
from peft_mlm.vocabulary import fit_vocabulary, growth_code, row_tables
from tests.tiny import MODEL_TYPES, difference, letter_tokenizer, perturb, same, save_base, save_encoder, tiny_model

# Types with something of their own to grow: columns beside the decoder, tables beside the embeddings, sizes that
# modules keep, decoders that are not tied, a config that does not say that they are.
OTHER_TYPES: dict[str, dict[str, Any]] = {
    "esmc": {},
    "eurobert": {},
    "flaubert": {},
    "fnet": {},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "neomme": {"embedding_rank": 16, "head_dim": 16},
    "xlm": {},
}
TYPES: dict[str, dict[str, Any]] = {**{name: {} for name in MODEL_TYPES}, **OTHER_TYPES}
# Growing these takes lines of its own beside transformers' `resize_token_embeddings`; AutoPeftModel is not enough.
MORE_LINES = ("esm", "mobilebert")
TOKENS = ["<new1>", "ABBA", "<new3>"]
OLD = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
NEW = torch.tensor([[0, 25, 9, 4, 26, 27, 20, 2]])
LORA = PEFTArguments(use_lora=True)


def logits(model: torch.nn.Module, ids: torch.Tensor = NEW) -> torch.Tensor:
    with torch.no_grad():
        given = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert isinstance(given, torch.Tensor)
    return given


def base_with_tokens(folder: Path, **options: Any) -> Base:
    return load_base(ModelArguments(model_name_or_path=str(folder), **{"add_tokens": TOKENS, **options}))


def trained_adapter(base: Base, folder: Path, peft: PEFTArguments = LORA) -> PeftModel:
    plan = plan_adapter(base.model, peft, fresh_parameters=base.fresh_parameters, new_token_ids=base.new_token_ids)
    model = wrap(base.model, plan)
    perturb(model)
    save_adapter(model, folder, base_name=str(base.name_or_path), tokenizer=base.tokenizer)
    return model


def plain_base(folder: Path, code: tuple[str, ...]) -> PreTrainedModel:
    """A fresh base, grown by the lines that the card gives."""
    names: dict[str, Any] = {"torch": torch, "base": AutoModelForMaskedLM.from_pretrained(folder)}
    exec("\n".join(code), names)
    grown: PreTrainedModel = names["base"]
    return grown


@pytest.mark.parametrize("model_type", TYPES)
def test_a_grown_model_is_the_old_one_and_is_read_back_by_plain_transformers(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type, **TYPES[model_type])
    old = AutoModelForMaskedLM.from_pretrained(folder)
    base = base_with_tokens(folder)
    assert base.new_token_ids == (25, 26, 27)
    assert is_tied(base.model) == is_tied(old)
    # more columns: a matrix product may add up in another order
    assert difference(logits(base.model.double(), OLD)[..., :25], logits(old.double(), OLD)) < 1e-12
    base.model.float()
    loss = base.model(input_ids=OLD, labels=torch.where(OLD == 4, 27, -100)).loss
    assert torch.isfinite(loss)
    base.model.save_pretrained(tmp_path / "grown")
    again, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == (set(), set())
    assert again.config.get_text_config().vocab_size == 28
    assert same(logits(again), logits(base.model))
    assert same(logits(base_with_tokens(folder).model), logits(base.model))


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_move_at_both_ends_and_every_way_of_loading_gives_the_trained_model(
    model_type: str, tmp_path: Path
) -> None:
    folder = save_base(tmp_path / "base", model_type, **TYPES[model_type])
    base = base_with_tokens(folder, new_token_init="pieces")
    before = logits(base.model)
    tables = {name: table.weight.detach().clone() for name, table in row_tables(base.model).items()}
    assert len(tables) == 1 + (not is_tied(base.model)) + (model_type == "neomme")
    plan = plan_adapter(base.model, LORA, new_token_ids=base.new_token_ids)
    model = wrap(base.model, plan)
    assert difference(logits(model), before) < 1e-6
    perturb(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter", base_name=str(folder), tokenizer=base.tokenizer)
    shipped = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in shipped.items() if "lora" not in name}
    assert {name: len(tensor) for name, tensor in rows.items()} == {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta": 3 for name in tables
    }

    again = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "adapter")))
    assert again.new_token_ids == base.new_token_ids
    ours = load_adapter(again.model, tmp_path / "adapter")
    assert same(logits(ours), trained)
    expected = logits(ours.double())
    plain = PeftModel.from_pretrained(plain_base(folder, base.growth_code), tmp_path / "adapter").merge_and_unload()
    assert difference(logits(plain.double()), expected) < 1e-6
    if model_type not in MORE_LINES:
        auto = AutoPeftModel.from_pretrained(tmp_path / "adapter").merge_and_unload()
        assert difference(logits(auto.double()), expected) < 1e-6
    for name, old in tables.items():
        weight: Any = plain.get_submodule(name).weight
        assert difference(weight[25:], old[25:]) > 1e-3
        assert torch.equal(weight[:25].float(), old[:25])
    merge_adapter(ours.float(), again.tokenizer, tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert is_tied(merged) == is_tied(base.model)
    assert difference(logits(merged.double()), expected) < 1e-6


def test_peft_by_itself_stores_the_embeddings_twice_and_leaves_out_the_decoders_bias(tmp_path: Path) -> None:
    """What PEFT does by default; if one of these fails, the library was mended."""
    base = base_with_tokens(save_base(tmp_path / "base", "bert"))
    before = logits(base.model)
    config = LoraConfig(target_modules=["query"])
    stored = get_peft_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), config)
    stored.get_base_model().resize_token_embeddings(28)
    stored.save_pretrained(tmp_path / "default", save_embedding_layers=True)
    whole = [n for n, t in load_file(tmp_path / "default" / "adapter_model.safetensors").items() if len(t) == 28]
    assert len(whole) >= 2
    rows = LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [25, 26, 27]})
    assert difference(logits(get_peft_model(base.model, rows)), before) > 1e-2
    nomic = base_with_tokens(save_base(tmp_path / "nomic", "nomic_bert"))
    del nomic.model.config.tie_word_embeddings
    all_linear = LoraConfig(target_modules="all-linear", trainable_token_indices=rows.trainable_token_indices)
    unlinked = get_peft_model(nomic.model, all_linear)
    perturb(unlinked)
    assert difference(logits(unlinked), logits(unlinked.merge_and_unload())) > 1e-2


def test_a_bias_starts_where_plain_transformers_starts_it() -> None:
    for model_type, changes in TYPES.items():
        if model_type in MORE_LINES:
            continue
        plain: Any = tiny_model(model_type, **changes)
        bias = getattr(plain.get_output_embeddings(), "bias", None)
        if bias is None:
            continue
        expected = 0.0 if is_tied(plain) else bias.mean().item()
        plain.resize_token_embeddings(28)
        given = plain.get_output_embeddings().bias[25:]
        assert difference(given, torch.full((3,), expected)) < 1e-6, model_type


@pytest.mark.parametrize("model_type", ["roberta", "rembert"])
def test_new_rows_start_at_the_mean_of_all_or_of_their_pieces(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path, model_type)
    mean, pieces = base_with_tokens(folder), base_with_tokens(folder, new_token_init="pieces")
    a, b = (letter_tokenizer().convert_tokens_to_ids(letter) for letter in "AB")
    for name, table in row_tables(mean.model).items():
        start: Any = table.weight
        old = start[:25].double()
        for i in range(25, 28):
            assert difference(start[i].double(), old.mean(dim=0)) < 1e-6
        other: Any = pieces.model.get_submodule(name).weight
        assert difference(other[26].double(), (old[a] + old[b]) / 2) < 1e-6
        assert difference(other[25].double(), old.mean(dim=0)) < 1e-6  # no piece of <new1> is known


def test_spare_rows_of_a_padded_matrix_are_new_rows(tmp_path: Path) -> None:
    """The checkpoint has values there, which no text ever trained; the library takes them as they are."""
    folder = save_base(tmp_path / "base", "roberta", vocab_size=27)
    base = base_with_tokens(folder, add_tokens=["<new1>"])
    assert base.new_token_ids == (25,)
    assert base.growth_code == ()
    assert "1 spare row" in base.notices[-1]
    table: Any = base.model.get_input_embeddings().weight
    assert len(table) == 27
    assert difference(table[25], table[:25].mean(dim=0)) < 1e-6
    more = base_with_tokens(folder)
    assert more.new_token_ids == (25, 26, 27)
    assert more.model.get_input_embeddings().weight.shape[0] == 28
    trained = logits(trained_adapter(more, tmp_path / "adapter"))
    again = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "adapter")))
    assert again.new_token_ids == more.new_token_ids
    assert same(logits(load_adapter(again.model, tmp_path / "adapter")), trained)
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert difference(logits(auto), trained) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["cls"]}, {"lora_target_modules": ["query"]}],
)
def test_new_rows_go_beside_variants_and_trained_parts_of_the_head(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    trained = logits(trained_adapter(base_with_tokens(folder), tmp_path / "adapter", PEFTArguments(True, **options)))
    again = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "adapter")))
    assert same(logits(load_adapter(again.model, tmp_path / "adapter")), trained)
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert difference(logits(auto), trained) < 1e-5


def test_new_rows_go_beside_a_fresh_head(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder")
    trained = logits(trained_adapter(base_with_tokens(folder), tmp_path / "adapter"))
    again = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "adapter")))
    assert same(logits(load_adapter(again.model, tmp_path / "adapter")), trained)
    torch.manual_seed(7)
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert difference(logits(auto), trained) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "rembert"])
@pytest.mark.parametrize("had_tokens", [True, False])
def test_an_adapter_that_training_goes_on_from_takes_further_tokens(
    model_type: str, had_tokens: bool, tmp_path: Path
) -> None:
    folder = save_base(tmp_path / "base", model_type)
    first = base_with_tokens(folder, add_tokens=["<new1>"] if had_tokens else None)
    ids = torch.tensor([[0, 25 if had_tokens else 8, 9, 4, 20, 2]])
    before = logits(trained_adapter(first, tmp_path / "first"), ids)
    wider = base_with_tokens(folder, tokenizer_name=str(tmp_path / "first"), add_tokens=["<new2>", "<new3>"])
    assert len(wider.new_token_ids) == 2 + had_tokens
    starts = {name: table.weight.detach()[-2:].clone() for name, table in row_tables(wider.model).items()}
    model = load_adapter(wider.model, tmp_path / "first", is_trainable=True, new_token_ids=wider.new_token_ids)
    assert difference(logits(model, ids)[..., : before.shape[-1]], before) < 1e-6
    deltas = dict(model.named_parameters())
    for name, start in starts.items():
        delta = deltas[f"base_model.model.{name}.token_adapter.trainable_tokens_delta.default"]
        assert delta.requires_grad
        assert torch.equal(delta[-2:], start)
    perturb(model)
    trained = logits(model, ids)
    save_adapter(model, tmp_path / "second", base_name=str(folder), tokenizer=wider.tokenizer)
    again = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "second")))
    assert same(logits(load_adapter(again.model, tmp_path / "second"), ids), trained)


def test_an_adapter_that_cannot_train_rows_takes_no_further_tokens(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "bert")
    trained_adapter(base_with_tokens(folder, add_tokens=None), tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    for change, said in (
        ({"peft_type": "VERA"}, "is of the method VERA"),
        ({"modules_to_save": ["word_embeddings"]}, "trains bert.embeddings.word_embeddings as a whole"),
    ):
        shutil.copytree(tmp_path / "first", tmp_path / "other", dirs_exist_ok=True)
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        base = base_with_tokens(folder)
        with pytest.raises(AdapterError, match=said):
            load_adapter(base.model, tmp_path / "other", is_trainable=True, new_token_ids=base.new_token_ids)


def test_a_model_without_a_plain_embedding_matrix_is_refused_before_it_is_changed() -> None:
    model = tiny_model("ibert")  # refused as a base, but code of one's own may have such embeddings
    with pytest.raises(ModelError, match="New tokens cannot be added to a ibert model"):
        fit_vocabulary(model, letter_tokenizer(extra=["<x>"]), name="ibert", may_grow=True)
    assert model.get_input_embeddings().weight.shape[0] == 25


def test_growing_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    folder = save_base(tmp_path, "bert")
    torch.manual_seed(3)
    load_base(ModelArguments(model_name_or_path=str(folder)))
    expected = torch.rand(2)
    torch.manual_seed(3)
    base = base_with_tokens(folder)
    assert torch.equal(torch.rand(2), expected)
    assert growth_code(base.model, 3) == ["base.resize_token_embeddings(28)"]
