"""Ties between embeddings and decoder: kept true, or cut so that both ends can be trained, merged and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, PreTrainedModel

from peft_mlm.adapter import load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.heads import tied_parameters
from peft_mlm.merging import is_tied, merge_adapter
from peft_mlm.model import Base, load_base
from peft_mlm.untying import decoder_reads_embeddings, keep_ties_of_checkpoint, untie_embeddings
from tests.tiny import MODEL_TYPES, difference, letter_tokenizer, logits_at, perturb, same, save_base, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
FEW_TYPES = ("bert", "esm", "modernbert", "electra")


def logits(model: torch.nn.Module) -> torch.Tensor:
    return logits_at(model, IDS)


def lora(**options: Any) -> PEFTArguments:
    return PEFTArguments(use_lora=True, **options)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(folder)


def untied(folder: Path, **changes: object) -> Base:
    return load_base(ModelArguments(model_name_or_path=str(folder), untie_embeddings=True, **changes))  # type: ignore[arg-type]


def both_ends(model: PreTrainedModel) -> tuple[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


def change_file(folder: Path, **changes: torch.Tensor) -> None:
    """Add tensors to a checkpoint, or replace them."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **changes}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_adapters_on_both_ends_of_an_untied_model_reload_and_merge_as_trained(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    before = logits(plain(folder))
    base = untied(folder)
    assert same(logits(base.model), before)
    assert not tied_parameters(base.model)
    assert base.model.config.tie_word_embeddings is False
    assert any("changes nothing" in notice for notice in base.notices) == (not is_tied(plain(folder)))
    embeddings, decoder = both_ends(base.model)
    plan = plan_adapter(
        base.model, PEFTArguments(use_lora=True, lora_target_modules=[embeddings], modules_to_save=[decoder])
    )
    model = wrap(base.model, plan)
    perturb(model)
    trained = logits(model)
    assert difference(trained, before) > 1e-2
    save_adapter(model, tmp_path / "adapter", base_name="base")
    again = load_adapter(untied(folder).model, tmp_path / "adapter")
    assert same(logits(again), trained)
    report = merge_adapter(again, letter_tokenizer(), tmp_path / "merged")
    assert report.max_abs_logit_diff < 1e-5 * max(1, report.max_abs_logit)
    merged = plain(tmp_path / "merged")
    assert difference(logits(merged), trained) < 2e-5
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "twice")
    assert same(logits(plain(tmp_path / "twice")), logits(merged))


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize("option", ["lora_target_modules", "modules_to_save"])
@pytest.mark.parametrize("end", [0, 1])
def test_an_adapter_on_one_end_moves_that_end_alone(model_type: str, option: str, end: int, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    base = untied(folder)
    ends = both_ends(base.model)
    before = [base.model.get_submodule(name).weight.detach().clone() for name in ends]
    model = wrap(base.model, plan_adapter(base.model, lora(**{option: [ends[end]]})))
    perturb(model)
    trained = logits(model)
    merge_adapter(model, letter_tokenizer(), tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    assert difference(logits(merged), trained) < 1e-5
    after = [merged.get_submodule(name).weight for name in ends]
    assert difference(after[1 - end], before[1 - end]) < 1e-5
    assert difference(after[end], before[end]) > 1e-3


def test_on_the_tied_base_plain_peft_merges_wrong_what_it_loads_right(tmp_path: Path) -> None:
    """So the card of such an adapter must not send its reader to plain PEFT for a merge."""
    folder = save_base(tmp_path / "base")
    for number, (option, end) in enumerate([("lora_target_modules", 0), ("modules_to_save", 0)]):
        base = untied(folder)
        name = both_ends(base.model)[end]
        model = wrap(base.model, plan_adapter(base.model, lora(**{option: [name]})))
        perturb(model)
        trained = logits(model)
        save_adapter(model, tmp_path / str(number), base_name="base")
        loaded = PeftModel.from_pretrained(plain(folder), tmp_path / str(number))
        assert difference(logits(loaded), trained) < 1e-5
        loaded.merge_and_unload().save_pretrained(tmp_path / f"merged{number}")
        assert difference(logits(plain(tmp_path / f"merged{number}")), trained) > 0.05


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "albert"])
def test_a_head_trained_by_plain_peft_is_lost_by_a_merge_and_not_by_ours(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    head = {"bert": "cls", "roberta": "lm_head", "deberta-v2": "cls", "albert": "predictions"}[model_type]
    theirs = get_peft_model(plain(folder), LoraConfig(target_modules=".*(query|query_proj)", modules_to_save=[head]))
    perturb(theirs)
    trained = logits(theirs)
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert difference(logits(plain(tmp_path / "theirs")), trained) > 0.05

    for untie in (False, True):
        base = load_base(ModelArguments(model_name_or_path=str(folder), untie_embeddings=untie))
        model = wrap(base.model, plan_adapter(base.model, PEFTArguments(use_lora=True, modules_to_save=[head])))
        perturb(model)
        trained = logits(model)
        merge_adapter(model, letter_tokenizer(), tmp_path / f"ours{untie}")
        merged = plain(tmp_path / f"ours{untie}")
        assert is_tied(merged) != untie
        assert difference(logits(merged), trained) < 1e-5


def test_plain_transformers_starts_a_random_decoder_where_it_is_told_not_to_tie(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    expected = logits(plain(folder))
    theirs = AutoModelForMaskedLM.from_pretrained(folder, tie_word_embeddings=False)
    assert difference(logits(theirs), expected) > 0.1
    assert same(logits(untied(folder).model), expected)


@pytest.mark.parametrize("model_type", FEW_TYPES)
def test_a_vocabulary_grown_before_untying_has_new_rows_on_both_ends(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    letter_tokenizer(extra=["<new1>", "<new2>"]).save_pretrained(tmp_path / "longer")
    base = untied(folder, tokenizer_name=str(tmp_path / "longer"))
    tied = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "longer")))
    assert same(logits(base.model), logits(tied.model))
    assert not tied_parameters(base.model)
    assert base.new_token_ids == (25, 26)
    for end in both_ends(base.model):
        weight = base.model.get_submodule(end).weight
        assert weight.shape[0] == 27
        assert difference(weight[25:], weight[:25].mean(dim=0)) < 1e-6
    perturb(base.model)  # full fine-tuning
    base.model.save_pretrained(tmp_path / "trained")
    again = plain(tmp_path / "trained")
    assert again.config.tie_word_embeddings is False
    assert same(logits(again), logits(base.model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_decoder_that_the_checkpoint_holds_apart_is_kept_apart(model_type: str, tmp_path: Path) -> None:
    """transformers loads both ends and goes on calling them tied; the next growth loses the decoder."""
    folder = save_base(tmp_path / "base", model_type)
    model = plain(folder)
    if not is_tied(model):
        return
    _, decoder = both_ends(model)
    own = model.get_output_embeddings().weight.detach() + torch.randn(25, 32)
    change_file(folder, **{f"{decoder}.weight": own})
    expected = logits(plain(folder))
    assert difference(expected, logits(model)) > 0.1

    theirs = plain(folder)
    assert theirs.config.tie_word_embeddings is True
    theirs.tie_weights()  # as `resize_token_embeddings` calls it
    assert difference(logits(theirs), expected) > 0.1

    letter_tokenizer(extra=["<new1>"]).save_pretrained(tmp_path / "longer")
    base = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "longer")))
    assert difference(logits(base.model)[..., :25], expected) < 1e-5
    assert base.model.config.tie_word_embeddings is False
    assert any(f"{decoder}.weight apart from" in notice for notice in base.notices)
    base.model.save_pretrained(tmp_path / "saved")
    assert same(logits(plain(tmp_path / "saved")), logits(base.model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_of_two_biases_in_the_checkpoint_the_decoders_own_is_used_and_said(model_type: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", model_type)
    model = plain(folder)
    biases = {target: source for target, source in model.all_tied_weights_keys.items() if target.endswith("bias")}
    if not biases:
        return
    ((target, source),) = biases.items()
    change_file(folder, **{target: model.get_parameter(source).detach() + torch.randn(25)})
    expected = logits(plain(folder))
    assert difference(expected, logits(model)) > 0.1
    base = load_base(ModelArguments(model_name_or_path=str(folder)))
    assert same(logits(base.model), expected)
    assert is_tied(base.model)
    assert base.model.get_parameter(target) is base.model.get_parameter(source)
    assert any(target in notice for notice in base.notices)
    base.model.save_pretrained(tmp_path / "saved")
    assert same(logits(plain(tmp_path / "saved")), expected)


def test_an_untied_model_that_grows_keeps_the_bias_of_its_decoder(tmp_path: Path) -> None:
    """Growing puts one bias in two places again; saved by plain transformers, one of them comes back as zero."""
    folder = save_base(tmp_path / "base", "bert", tie_word_embeddings=False)
    letter_tokenizer(extra=["<new1>"]).save_pretrained(tmp_path / "longer")
    base = load_base(ModelArguments(model_name_or_path=str(folder), tokenizer_name=str(tmp_path / "longer")))
    assert not tied_parameters(base.model)
    base.model.save_pretrained(tmp_path / "saved")
    assert same(logits(plain(tmp_path / "saved")), logits(base.model))


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_a_model_that_computes_with_the_embeddings_themselves_is_not_untied_nor_adapted_there(model_type: str) -> None:
    model = tiny_model(model_type, legacy=False)
    assert decoder_reads_embeddings(model)
    with pytest.raises(ModelError, match="Leave --untie_embeddings out"):
        untie_embeddings(model)
    for option in ("lora_target_modules", "modules_to_save"):
        with pytest.raises(AdapterError, match="tied"):
            plan_adapter(model, lora(**{option: ["word_embeddings"]}))


def test_asking_whether_the_decoder_reads_the_embeddings_changes_nothing() -> None:
    model = tiny_model("bert").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert decoder_reads_embeddings(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not decoder_reads_embeddings(tiny_model("rembert"))
    assert keep_ties_of_checkpoint(model) is None


def test_a_tied_matrix_is_refused_with_the_remedy() -> None:
    for option in ("lora_target_modules", "modules_to_save"):
        for name in ("word_embeddings", "decoder"):
            with pytest.raises(AdapterError, match="--untie_embeddings"):
                plan_adapter(tiny_model("bert"), lora(**{option: [name]}))


def test_a_layer_that_no_prediction_depends_on_is_refused() -> None:
    model = tiny_model("mobilebert", intra_bottleneck_size=32, true_hidden_size=32)
    untie_embeddings(model)
    with pytest.raises(AdapterError, match=r"no prediction depends on the output of cls\.predictions\.decoder"):
        plan_adapter(model, PEFTArguments(use_lora=True, lora_target_modules=["decoder"]))


def test_the_recipe_beside_the_adapter_says_that_the_base_was_untied(base_folder: Path, tmp_path: Path) -> None:
    import peft_mlm
    from peft_mlm.loading import load

    text = tmp_path / "text.txt"
    text.write_text("\n".join("ABCDEFGHIJKLMNOP"[i % 5 :] for i in range(60)))
    run = peft_mlm.train(
        {
            "model_name_or_path": base_folder,
            "train_file": text,
            "output_dir": tmp_path / "run",
            "use_lora": True,
            "untie_embeddings": True,
            "lora_target_modules": ["word_embeddings", "decoder"],
            "max_steps": 3,
            "learning_rate": 0.05,
        }
    )
    assert json.loads((run.run_folder / "adapter" / "base_recipe.json").read_text()) == {"untie_embeddings": True}
    loaded = load(str(run.run_folder))
    assert not tied_parameters(loaded.model.get_base_model())
    assert same(logits(loaded.model), logits(run.model))
    assert difference(logits(loaded.model), logits(plain(base_folder))) > 1e-3
    figures = peft_mlm.evaluate(str(run.run_folder))
    assert figures["loss"] == pytest.approx(run.metrics["adapted"]["loss"])
    assert peft_mlm.evaluate(str(run.run_folder), use_base=True)["loss"] == pytest.approx(run.metrics["base"]["loss"])
    peft_mlm.merge(str(run.run_folder), output_dir=tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    assert difference(logits(merged), logits(run.model)) < 1e-5
    assert merged.config.tie_word_embeddings is False
    (filled,) = peft_mlm.fill_mask(str(run.run_folder), "ABC<mask>EF")
    ids = run.tokenizer("ABC<mask>EF", return_tensors="pt")
    with torch.no_grad():
        scores = run.model(**ids).logits[0, filled["masks"][0]["position"]].softmax(-1)
    assert filled["masks"][0]["predictions"][0]["probability"] == pytest.approx(scores.max().item(), abs=1e-6)
    card = (run.run_folder / "adapter" / "README.md").read_text()
    assert "peft-mlm merge" in card
    assert "merge_and_unload" in card


def test_a_whole_model_is_trained_untied_and_loaded_by_plain_transformers(base_folder: Path, tmp_path: Path) -> None:
    import peft_mlm

    text = tmp_path / "text.txt"
    text.write_text("\n".join("ABCDEFGHIJKLMNOP"[i % 5 :] for i in range(60)))
    common: dict[str, Any] = {"train_file": text, "max_steps": 3, "learning_rate": 0.01, "untie_embeddings": True}
    small = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
    scratch = {"model_type": "bert", "tokenizer_name": base_folder, "config_overrides": small}
    for name, base in (("base", {"model_name_or_path": base_folder}), ("scratch", scratch)):
        run = peft_mlm.train({**common, **base, "output_dir": tmp_path / name})
        model = plain(run.run_folder / "model")
        assert model.config.tie_word_embeddings is False
        assert not tied_parameters(model)
        assert difference(model.get_input_embeddings().weight, model.get_output_embeddings().weight) > 1e-3
        assert same(logits(model), logits(run.model))
