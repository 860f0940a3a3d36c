"""Predictions at masks against a plain softmax over all positions, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_mlm.errors import DataError, ModelError
from peft_mlm.gathered_head import find_door
from peft_mlm.loading import Loaded
from peft_mlm.masked_rows import batches_of
from peft_mlm.model import Base
from peft_mlm.predicting import MANY_TEXTS, Predictor, Question, at_positions, read_masks, with_own_mask
from tests.tiny import LETTERS, MODEL_TYPES, letter_texts, letter_tokenizer, tiny_model

TEXTS = ["ABC<mask>EF", "<mask>", "A<mask>C<mask><mask>", "CBA<mask>TR", "ABCDEFGHIJ<mask>", "BBB<mask>BB"]
QUESTION = Question(top_k=4, targets=["C", "A", "T"], only=["D", "C", "B", "C", "A", "E", "F"])


def loaded(model_type: str = "roberta", **changes: Any) -> Loaded:
    model, tokenizer = tiny_model(model_type, **changes).double(), letter_tokenizer()
    return Loaded(model, tokenizer, Base(model, tokenizer, None))


def answers(one: Loaded, texts: list[str], question: Question, **options: Any) -> list[dict[str, Any]]:
    predictor = Predictor(one, **options)
    return predictor.predict(one.model, predictor.read(texts, question), question)


def dense_logits(one: Loaded, text: str) -> tuple[list[int], torch.Tensor]:
    """Where the masks are, and the logits there, of a plain forward pass of this text alone."""
    ids = one.tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = one.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
    places = [place for place, token in enumerate(ids) if token == 4]
    return places, logits[places]


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "longformer", "fnet"])
def test_predictions_targets_and_ranks_are_those_of_a_plain_softmax(model_type: str) -> None:
    one = loaded(model_type)
    results = answers(one, TEXTS, Question(top_k=4, targets=["C", "A", "T"]))
    assert [result["text"] for result in results] == TEXTS
    for text, result in zip(TEXTS, results, strict=True):
        places, logits = dense_logits(one, text)
        assert [mask["position"] for mask in result["masks"]] == places
        for mask, row in zip(result["masks"], logits.tolist(), strict=True):
            total = sum(torch.tensor(row, dtype=torch.float64).exp().tolist())
            order = sorted(range(len(row)), key=lambda token: -row[token])
            assert [p["token_id"] for p in mask["predictions"]] == order[:4]
            for found in [*mask["predictions"], *mask["targets"]]:
                expected = torch.tensor(row[found["token_id"]], dtype=torch.float64).exp().item() / total
                assert found["probability"] == close(expected)
            assert [t["target"] for t in mask["targets"]] == ["C", "A", "T"]
            for target in mask["targets"]:
                assert target["token"] == target["target"]
                assert target["token_id"] == 5 + LETTERS.index(target["target"])
                assert order[target["rank"] - 1] == target["token_id"]


def test_among_some_words_alone_probabilities_are_given_over_all_tokens_and_over_these() -> None:
    one = loaded()
    allowed = [5 + LETTERS.index(letter) for letter in "ABCDEF"]
    for text, result in zip(TEXTS, answers(one, TEXTS, QUESTION), strict=True):
        _, logits = dense_logits(one, text)
        for mask, row in zip(result["masks"], logits, strict=True):
            everything = row.softmax(-1).tolist()
            total = sum(everything[token] for token in allowed)
            best = sorted(allowed, key=lambda token: -everything[token])
            ranks = {token: sum(p > everything[token] for p in everything) + 1 for token in range(len(everything))}
            assert [p["token_id"] for p in mask["predictions"]] == best[:4]
            for found in mask["predictions"]:
                token = found["token_id"]
                assert found["probability"] == close(everything[token])
                assert found["probability_among"] == close(everything[token] / total)
                assert found["rank"] == ranks[token]
            c, a, t = mask["targets"]
            for target in (c, a):
                assert target["probability_among"] == close(everything[target["token_id"]] / total)
                assert best[target["rank_among"] - 1] == target["token_id"]
            assert (t["probability_among"], t["rank_among"]) == (None, None)
            assert t["rank"] == ranks[t["token_id"]]


def test_the_filled_text_takes_the_best_of_those_allowed() -> None:
    (result,) = answers(loaded(), ["A<mask>C<mask>"], Question(only=["K"]))
    assert result["filled"].replace(" ", "") == "AKCK"
    assert [len(mask["predictions"]) for mask in result["masks"]] == [1, 1]


@pytest.mark.parametrize("max_tokens", [1, 12, 100, 10_000])
def test_batches_change_nothing(max_tokens: int) -> None:
    one = loaded()
    texts = [text[:3] + "<mask>" + text[4:] for text in letter_texts(30, longest=14)]
    alone = [answers(one, [text], QUESTION)[0] for text in texts]
    together = answers(one, texts, QUESTION, max_tokens_per_batch=max_tokens)
    for result, expected in zip(together, alone, strict=True):
        assert (result["text"], result["filled"]) == (expected["text"], expected["filled"])
        for mask, single in zip(result["masks"], expected["masks"], strict=True):
            for kind in ("predictions", "targets"):
                for found, other in zip(mask[kind], single[kind], strict=True):
                    assert found == {k: close(v) if isinstance(v, float) else v for k, v in other.items()}


def test_texts_of_a_batch_have_one_length_and_all_are_in_one() -> None:
    lengths = [5, 3, 5, 5, 9, 3, 5]
    batches = list(batches_of(lengths, 11))
    assert batches == [[4], [0, 2], [3, 6], [1, 5]]
    assert list(batches_of([], 11)) == []


def test_the_head_sees_the_chosen_positions_alone() -> None:
    one = loaded()
    rows: list[int] = []
    handle = one.model.lm_head.decoder.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[:-1].numel())
    )
    ids = torch.tensor([[0, 6, 4, 8, 4, 2], [0, 4, 7, 8, 9, 2]])
    found = at_positions(one.model, ids, ids == 4, lambda row: row, door=find_door(one.model))
    assert rows[-1] == 3
    handle.remove()
    expected = one.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[ids == 4]
    assert torch.allclose(torch.stack(found), expected, rtol=0, atol=1e-12)


def test_with_logits_in_pieces_answers_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    one = loaded()
    expected = answers(one, TEXTS, QUESTION)
    monkeypatch.setattr("peft_mlm.predicting.sum_over_masked", _in_small_pieces)
    for result, whole in zip(answers(one, TEXTS, QUESTION), expected, strict=True):
        assert [m["predictions"][0]["token_id"] for m in result["masks"]] == [
            m["predictions"][0]["token_id"] for m in whole["masks"]
        ]
        assert [m["targets"][0]["rank"] for m in result["masks"]] == [m["targets"][0]["rank"] for m in whole["masks"]]


def _in_small_pieces(*args: Any, **options: Any) -> Any:
    from peft_mlm.gathered_head import sum_over_masked

    return sum_over_masked(*args, **options, logits_bytes=1)


def test_single_precision_is_computed_in_single_precision() -> None:
    model, tokenizer = tiny_model("bert").bfloat16(), letter_tokenizer()
    one = Loaded(model, tokenizer, Base(model, tokenizer, None))
    (result,) = answers(one, ["AB<mask>"], Question(top_k=25))
    assert sum(p["probability"] for p in result["masks"][0]["predictions"]) == pytest.approx(1, rel=1e-6)


def test_either_spelling_of_the_mask_is_the_tokenizers_own() -> None:
    tokenizer = letter_tokenizer()
    assert with_own_mask(tokenizer, "A[MASK]B<mask>") == "A<mask>B<mask>"
    assert read_masks(tokenizer, "A[MASK]B<mask>", None).positions == [2, 4]


def test_a_text_without_mask_or_too_long_or_a_word_of_several_tokens_is_refused_before_anything_is_computed() -> None:
    one = loaded()
    one.model.forward = None  # whoever computes fails
    predictor = Predictor(one)
    for texts, question, said in (
        (["A<mask>", "ABC"], Question(), "There is no mask in 'ABC'"),
        (["A<mask>", "A" * 61], Question(), f"There is no mask in '{'A' * 60}'\\.\\.\\.\\. Write"),
        (["A" * 60 + "<mask>"], Question(), "A text has 63 tokens, the model holds 62"),
        (["A<mask>"], Question(targets=["AB"]), "targets: not one token within a word: 'AB' is A"),
        (["A<mask>"], Question(only=["A", "AB"]), "only: not one token"),
    ):
        with pytest.raises(DataError, match=said):
            predictor.read(texts, question)


def test_a_tokenizer_without_mask_token_is_refused() -> None:
    one = loaded()
    one.tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        Predictor(one)


def test_many_texts_are_answered_in_order() -> None:
    one = loaded()
    texts = [text[:5] + "<mask>" for text in letter_texts(MANY_TEXTS + 1)]
    results = answers(one, texts, Question(top_k=1))
    assert [result["text"] for result in results] == texts
