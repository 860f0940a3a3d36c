"""LoRA out of a trained model: its matrices against the dense differences, its logits against the model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import peft_mlm
from tests.adapters import adapted_logits, changes_of, logits_of, merged_parameters
from tests.commands.conftest import Answer, train
from tests.tiny import letter_tokenizer, save_base


def model_of(run: Path) -> Path:
    return run / "model"


def test_each_layer_gets_the_best_approximation_of_its_difference_and_the_rest_is_told(
    full_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    record = peft_mlm.extract(str(full_run), tmp_path / "out", rank=3)
    base, tuned = merged_parameters(base_folder, None), merged_parameters(model_of(full_run), None)
    given = changes_of(base_folder, tmp_path / "out")
    left, everything = 0.0, 0.0
    for name in base:
        change = tuned[name] - base[name]
        everything += float(change.square().sum())
        if name.removesuffix(".weight") in record["matrices"]:
            spectrum = torch.linalg.svdvals(change)
            assert (given[name] - change).norm() == pytest.approx(float(spectrum[3:].norm()), rel=1e-3)
        else:
            assert not given[name].any()
            left += float(change.square().sum())
            assert (name in record["left_out"]) == bool(change.any())
    assert len(record["matrices"]) == 12
    assert record["left_out_share"] == pytest.approx((left / everything) ** 0.5, rel=1e-6)
    model, extracted = (
        logits_of(AutoModelForMaskedLM.from_pretrained(model_of(full_run))),
        adapted_logits(base_folder, tmp_path / "out"),
    )
    assert record["logits"]["max_abs_logit_diff"] == pytest.approx(float((model - extracted).abs().max()), rel=0.9)
    assert json.loads((tmp_path / "out" / "extraction.json").read_text())["left_out"] == record["left_out"]


def test_all_of_it_carried_at_full_rank_is_the_model_but_for_the_bias_of_the_tied_decoder(
    full_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    record = peft_mlm.extract(str(full_run), tmp_path / "out", rank=32, carry="all")
    assert record["left_out"] == ["lm_head.bias"]
    model = AutoModelForMaskedLM.from_pretrained(model_of(full_run))
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.lm_head.bias.copy_(base.lm_head.bias)
    loaded = peft_mlm.load(str(tmp_path / "out"), base=str(base_folder)).model
    assert (logits_of(loaded) - logits_of(model)).abs().max() < 1e-5
    report = peft_mlm.merge(str(tmp_path / "out"), tmp_path / "merged", base=str(base_folder))
    assert report["tied"] is True
    assert (logits_of(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")) - logits_of(model)).abs().max() < 1e-5


def test_groups_are_carried_one_by_one(full_run: Path, tmp_path: Path) -> None:
    left = {}
    for group in ("biases", "norms", "embeddings", "head"):
        record = peft_mlm.extract(str(full_run), tmp_path / group, rank=32, carry=group)
        left[group] = set(record["left_out"])
    nothing = set(peft_mlm.extract(str(full_run), tmp_path / "nothing", rank=32)["left_out"])
    carried = {group: nothing - names for group, names in left.items()}
    assert all("attention" in name or "dense" in name for name in carried["biases"])
    assert all("LayerNorm" in name and "lm_head" not in name for name in carried["norms"])
    assert carried["head"] == {
        "lm_head.dense.weight", "lm_head.dense.bias", "lm_head.layer_norm.weight", "lm_head.layer_norm.bias"
    }  # fmt: skip
    assert "roberta.embeddings.word_embeddings.weight" in carried["embeddings"]
    assert set.union(*carried.values()) | {"lm_head.bias"} == nothing
    assert sum(map(len, carried.values())) == len(nothing) - 1


def test_a_model_with_new_tokens_ships_their_rows_and_its_tokenizer(tmp_path: Path, base_folder: Path) -> None:
    tuned = AutoModelForMaskedLM.from_pretrained(base_folder)
    tokenizer = letter_tokenizer(["xx", "yy"])
    tuned.resize_token_embeddings(27)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[25:] = torch.randn(2, 32)
        tuned.get_input_embeddings().weight[9] += 1
        for parameter in tuned.roberta.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    options = {"rank": 32, "base": str(base_folder), "carry": ["biases", "norms"]}
    peft_mlm.extract(str(tmp_path / "tuned"), tmp_path / "out", **options)
    loaded = peft_mlm.load(str(tmp_path / "out"), base=str(base_folder))
    assert loaded.tokenizer.convert_tokens_to_ids("yy") == 26
    with torch.no_grad():
        tuned.get_input_embeddings().weight[9] -= 1  # an old token's row is carried only with `embeddings`
    assert (logits_of(loaded.model) - logits_of(tuned)).abs().max() < 1e-5


def test_a_head_that_the_base_lacks_is_always_carried(
    encoder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = train(encoder, text_file, held_out, tmp_path / "run", use_lora=False, max_steps=5)
    record = peft_mlm.extract(str(run), tmp_path / "out", rank=32, carry=["biases", "norms", "embeddings"])
    assert "cls.predictions.transform.dense.weight" in record["trained_parameters"]
    one, other = (peft_mlm.load(str(tmp_path / "out"), base=str(encoder)).model for _ in range(2))
    assert torch.equal(logits_of(one), logits_of(other))


def test_mistakes_end_in_one_sentence_and_leave_nothing(
    full_run: Path,
    trained_run: Path,
    base_folder: Path,
    other_base: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
) -> None:
    out = tmp_path / "out"
    model = tmp_path / "model"
    shutil.copytree(model_of(full_run), model)
    words = ("--rank", "4", "--output_dir", out)
    assert "Give it with --base" in command("extract", model, *words).fault
    assert "is an adapter" in command("extract", trained_run, *words).fault
    assert "head, other, or all" in command("extract", full_run, *words, "--carry", "hat").fault
    assert "nothing to extract" in command("extract", base_folder, "--base", base_folder, *words).fault
    bert = save_base(tmp_path / "bert", "bert")
    assert "different types" in command("extract", model, "--base", bert, *words).fault
    wider = save_base(tmp_path / "wider", intermediate_size=128)
    assert "not of one make" in command("extract", model, "--base", wider, *words).fault
    assert "rank is 0" in command("extract", full_run, "--rank", "0", "--output_dir", out).fault
    assert not out.exists()


@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("rembert", set()),  # its decoder is a matrix of its own
        ("nomic_bert", {"nomic_bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}),
        ("albert", {"predictions.bias"}),
        ("squeezebert", {"cls.predictions.bias"}),  # convolutions
    ],
)
def test_what_is_not_left_out_is_the_trained_model_for_unlike_types(
    model_type: str, left: set[str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", model_type)
    tuned = AutoModelForMaskedLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name not in left:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tuned.save_pretrained(tmp_path / "tuned")
    letter_tokenizer().save_pretrained(tmp_path / "tuned")
    options = {"rank": 64, "base": str(base), "carry": "all"}
    record = peft_mlm.extract(str(tmp_path / "tuned"), tmp_path / "out", **options)
    assert record["logits"]["max_abs_logit_diff_base"] > 0.1
    assert record["logits"]["max_abs_logit_diff"] < 1e-5 * record["logits"]["max_abs_logit"]
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in left:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    again = peft_mlm.extract(str(tmp_path / "tuned"), tmp_path / "again", **options)
    assert set(again["left_out"]) == left
