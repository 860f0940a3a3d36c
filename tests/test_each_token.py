"""Each token masked in turn, by several models, against a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_mlm.each_token import each_token
from peft_mlm.errors import DataError
from peft_mlm.loading import load
from peft_mlm.predicting import Predictor
from peft_mlm.pseudo_likelihood import pseudo_log_likelihoods
from peft_mlm.side_by_side import Sides, load_sides
from tests.adapters import save_random_adapter

TEXT = "ABCDzEFG A"


@pytest.fixture(scope="module")
def sides(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = tmp_path_factory.mktemp("adapters")
    paths = [save_random_adapter(base_folder, folder / name, seed) for seed, name in enumerate(("one", "two"), 1)]
    return load_sides([str(path) for path in paths])


def test_each_tokens_probability_rank_and_best_are_those_of_a_plain_loop(sides: Sides) -> None:
    record = each_token(sides, Predictor(sides.loaded(None)), TEXT)
    ids = sides.tokenizer(TEXT)["input_ids"]
    scored = [place for place, token in enumerate(ids) if token >= 5]
    assert len(scored) == 8  # the letter that is unknown is not among them
    assert record["unknown"] == 1
    assert [side["name"] for side in record["sides"]] == [None, "one", "two"]
    assert [token["token_id"] for token in record["tokens"]] == [ids[place] for place in scored]
    for number, name in enumerate([None, "one", "two"]):
        model = sides.loaded(name).model
        for place, token in zip(scored, record["tokens"], strict=True):
            masked = torch.tensor([[*ids[:place], 4, *ids[place + 1 :]]])
            with torch.no_grad():
                row = model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits[0, place].double()
            view = token["views"][number]
            probabilities = row.softmax(-1)
            assert view["probability"] == pytest.approx(probabilities[ids[place]].item(), rel=1e-5)
            assert view["rank"] == int((row > row[ids[place]]).sum()) + 1
            assert view["best_id"] == int(row.argmax())
            assert view["best_probability"] == pytest.approx(probabilities.max().item(), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_totals_are_the_pseudo_likelihoods_whatever_the_batches(sides: Sides, max_tokens: int) -> None:
    record = each_token(sides, Predictor(sides.loaded(None), max_tokens_per_batch=max_tokens), TEXT)
    for side in record["sides"]:
        (expected,) = pseudo_log_likelihoods(sides.loaded(side["name"]).model, sides.tokenizer, [TEXT])
        assert side["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-6)
        assert side["pseudo_perplexity"] == pytest.approx(expected.pseudo_perplexity, rel=1e-6)


def test_tokens_know_their_place_in_the_text(sides: Sides) -> None:
    record = each_token(sides, Predictor(sides.loaded(None)), "AB  C")
    assert [(token["token"], token["start"], token["end"]) for token in record["tokens"]][:2] == [
        ("A", 0, 1),
        ("B", 1, 2),
    ]
    assert record["text"][record["tokens"][2]["start"] : record["tokens"][2]["end"]].strip() == "C"


def test_a_real_model_and_its_tokenizer_with_words(antiberty: Path) -> None:
    sides = load_sides([str(antiberty)])
    text = "Q V Q L V Q S G A"
    record = each_token(sides, Predictor(load(str(antiberty))), text)
    assert [token["token"] for token in record["tokens"]] == text.split()
    assert [text[token["start"] : token["end"]] for token in record["tokens"]] == text.split()
    assert record["sides"][0]["name"] == antiberty.name
    assert record["sides"][0]["pseudo_perplexity"] < 10


def test_a_text_without_tokens_or_too_long_is_refused(sides: Sides) -> None:
    predictor = Predictor(sides.loaded(None))
    with pytest.raises(DataError, match="no token to predict"):
        each_token(sides, predictor, "zzz")
    with pytest.raises(DataError, match="holds 62"):
        each_token(sides, predictor, "A" * 61)
