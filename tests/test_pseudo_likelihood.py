"""Pseudo-log-likelihoods equal a plain loop: one masked row at a time, the whole head, float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.collator import from_tokenizer
from peft_mlm.errors import DataError, ModelError
from peft_mlm.masked_rows import MaskedRow, log_probabilities
from peft_mlm.pseudo_likelihood import VARIANTS, encode_texts, pseudo_log_likelihoods, pseudo_perplexity
from tests.test_tokenizer import byte_level, sentence_pieces
from tests.tiny import MODEL_TYPES, SPECIAL, letter_texts, letter_tokenizer, perturb, tiny_model

TEXTS = ["ABCDEFGH", "TSRQPONMLKJ", "AABB", "C", "HGFEDCBA"]
# Some of the types whose rows change with the padding beside them, or that pad rows themselves.
SENSITIVE = ("fnet", "nystromformer", "longformer", "xmod")


def by_hand(model: Any, ids: list[int], masked: list[list[int]], read: list[int], mask_id: int) -> list[float]:
    """One row at a time: mask, run the whole model, read one number."""
    found = []
    for places, place in zip(masked, read, strict=True):
        row = torch.tensor([ids])
        row[0, places] = mask_id
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits.double()
        found.append(float(logits[0, place].log_softmax(-1)[ids[place]]))
    return found


def plain(model: Any, tokenizer: Any, text: str) -> list[float]:
    ids = tokenizer(text)["input_ids"]
    read = [place for place, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    return by_hand(model, ids, [[place] for place in read], read, tokenizer.mask_token_id)


def word_pieces() -> Any:
    """As BERT's: words in pieces, punctuation by itself."""
    pieces = ["so", "##uven", "##ir", "shop", "do", "##n", "'", "t", "un", "##afford", "##able", "."]
    return BertTokenizer(
        vocab={token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])}
    )


def words_of(tokenizer: Any, text: str) -> list[list[str]]:
    """The tokens of a text, word by word."""
    (row,) = encode_texts(tokenizer, [text], tiny_model("bert", vocab_size=400))
    words: dict[int, list[str]] = {}
    for token, word in zip(tokenizer.convert_ids_to_tokens(row.ids[row.scored].tolist()), row.words, strict=True):
        words.setdefault(word, []).append(token)
    return list(words.values())


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *SENSITIVE])
def test_a_text_scores_as_in_a_plain_loop_alone_and_among_others_at_any_batch_size(model_type: str) -> None:
    model, tokenizer = tiny_model(model_type).double(), letter_tokenizer()
    expected = [plain(model, tokenizer, text) for text in TEXTS]
    for tokens in (1, 37, 4096):
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, max_tokens_per_batch=tokens)
        for score, wanted in zip(scores, expected, strict=True):
            assert score.log_probabilities.tolist() == pytest.approx(wanted, abs=1e-9)
            assert score.log_likelihood == pytest.approx(math.fsum(wanted), abs=1e-9)
            assert score.pseudo_perplexity == pytest.approx(math.exp(-math.fsum(wanted) / len(wanted)), rel=1e-9)
            assert score.tokens == len(wanted)
    (alone,) = pseudo_log_likelihoods(model, tokenizer, TEXTS[1:2])
    assert alone.log_probabilities.tolist() == pytest.approx(expected[1], abs=1e-9)


def test_with_an_adapter_and_in_the_mode_of_training_the_scores_are_those_of_the_adapted_model() -> None:
    base = tiny_model("roberta")
    model = wrap(base, plan_adapter(base, PEFTArguments(use_lora=True, lora_r=4, lora_dropout=0.5))).double()
    perturb(model)
    tokenizer = letter_tokenizer()
    expected = [plain(model.eval(), tokenizer, text) for text in TEXTS]
    scores = pseudo_log_likelihoods(model.train(), tokenizer, TEXTS)
    assert model.training
    for score, wanted in zip(scores, expected, strict=True):
        assert score.log_probabilities.tolist() == pytest.approx(wanted, abs=1e-9)
    with model.disable_adapter():
        (without,) = pseudo_log_likelihoods(model, tokenizer, TEXTS[:1])
    assert abs(without.log_likelihood - scores[0].log_likelihood) > 1e-3


def test_logits_in_half_precision_are_normalised_in_float32() -> None:
    model, tokenizer = tiny_model("bert").bfloat16(), letter_tokenizer()
    (score,) = pseudo_log_likelihoods(model, tokenizer, ["ABC"], door=None)
    row = torch.tensor([tokenizer("ABC")["input_ids"]])
    row[0, 1] = tokenizer.mask_token_id
    with torch.no_grad():
        batch = row.repeat(3, 1)
        batch[1, 1], batch[1, 2] = tokenizer("ABC")["input_ids"][1], tokenizer.mask_token_id
        batch[2, 1], batch[2, 3] = tokenizer("ABC")["input_ids"][1], tokenizer.mask_token_id
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    exact = logits.double().log_softmax(-1)
    wanted = [float(exact[i, i + 1, tokenizer("ABC")["input_ids"][i + 1]]) for i in range(3)]
    assert score.log_probabilities.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [word_pieces, byte_level])
def test_variants_mask_what_they_say_of_a_word(variant: Any, make: Any) -> None:
    tokenizer = make()
    text = "souvenir shop" if make is word_pieces else "patient took aspirins"
    model = tiny_model("bert", vocab_size=400).double()
    ids = tokenizer(text)["input_ids"]
    words = tokenizer(text).word_ids()
    read = [place for place, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    assert len({words[place] for place in read}) < len(read)  # some word has several tokens
    masked = {
        "original": [[place] for place in read],
        "within_word_l2r": [[o for o in read if words[o] == words[place] and o >= place] for place in read],
        "whole_word": [[o for o in read if words[o] == words[place]] for place in read],
    }[variant]
    (score,) = pseudo_log_likelihoods(model, tokenizer, [text], variant=variant)
    wanted = by_hand(model, ids, masked, read, tokenizer.mask_token_id)
    assert score.log_probabilities.tolist() == pytest.approx(wanted, abs=1e-9)


def test_word_pieces_make_a_word_and_punctuation_is_one_of_its_own() -> None:
    found = words_of(word_pieces(), "souvenir shop unaffordable. don't")
    assert found == [
        ["so", "##uven", "##ir"],
        ["shop"],
        ["un", "##afford", "##able"],
        ["."],
        ["do", "##n"],
        ["'"],
        ["t"],
    ]


def test_byte_level_pieces_make_a_word_with_the_space_before_it_and_with_characters_of_several_bytes() -> None:
    tokenizer = byte_level()
    for text, count in (("the patients took aspirin", 4), ("ünïcödé 🙂 cat", 3), ("took  the\tcat\n", None)):
        found = words_of(tokenizer, text)
        if count is not None:
            assert len(found) == count
        joined = [tokenizer.convert_tokens_to_string(word) for word in found]
        assert "".join(joined) == text
        assert all(not any(letter.isspace() for letter in word.strip()) for word in joined)


def test_sentence_pieces_make_a_word_from_space_to_space() -> None:
    assert words_of(sentence_pieces(), "the catalog took") == [["▁the"], ["▁cat", "a", "l", "o", "g"], ["▁took"]]


def test_a_tokenizer_that_takes_a_text_for_one_word_is_parted_at_spaces() -> None:
    pieces = [*((token, 0.0) for token in SPECIAL), ("▁the", -1.0), ("▁ca", -1.0), ("t", -2.0), ("▁", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>")
    assert set(tokenizer("the cat the").word_ids()) == {0}
    assert words_of(tokenizer, "the cat the") == [["▁the"], ["▁ca", "t"], ["▁the"]]


def test_special_tokens_in_a_text_are_not_scored_and_unknown_ones_are_counted() -> None:
    model, tokenizer = tiny_model("roberta").double(), letter_tokenizer()
    (score,) = pseudo_log_likelihoods(model, tokenizer, ["AB<mask>C?</s>D"])
    ids = tokenizer("AB<mask>C?</s>D")["input_ids"]
    special = set(from_tokenizer(tokenizer).special_ids.tolist())
    assert score.token_ids.tolist() == [token for token in ids if token not in special]
    assert (score.tokens, score.unknown) == (4, 1)


def test_a_text_without_tokens_scores_nothing_and_fails_nothing() -> None:
    model, tokenizer = tiny_model("roberta"), letter_tokenizer()
    empty, full, unknown = pseudo_log_likelihoods(model, tokenizer, ["", "ABC", "??"])
    assert (empty.tokens, empty.log_likelihood, unknown.tokens, unknown.unknown) == (0, 0.0, 0, 2)
    assert math.isnan(empty.pseudo_perplexity)
    assert full.tokens == 3
    assert pseudo_log_likelihoods(model, tokenizer, []) == []


def test_a_longer_text_than_the_model_holds_is_refused_by_number_or_cut() -> None:
    model, tokenizer = tiny_model("roberta").double(), letter_tokenizer()
    long = letter_texts(1, shortest=100, longest=100)[0]
    with pytest.raises(DataError, match=r"holds 62 tokens.* 2 \(102 tokens\), 3 \(102 tokens\)\. .*--truncate"):
        pseudo_log_likelihoods(model, tokenizer, ["AB", long, long])
    (cut,) = pseudo_log_likelihoods(model, tokenizer, [long], truncate=True)
    (short,) = pseudo_log_likelihoods(model, tokenizer, [long[:60]])
    assert (cut.tokens, cut.cut, short.cut) == (60, 40, 0)
    assert cut.log_probabilities.tolist() == pytest.approx(short.log_probabilities.tolist(), abs=1e-9)


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    tokenizer = letter_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        pseudo_log_likelihoods(tiny_model("bert"), tokenizer, ["AB"])


def test_the_perplexity_of_many_tokens_is_that_of_their_mean_and_beyond_floats_infinite() -> None:
    assert pseudo_perplexity(-6.0, 3) == pytest.approx(math.exp(2))
    assert pseudo_perplexity(-1e6, 2) == math.inf
    assert math.isnan(pseudo_perplexity(0.0, 0))


def test_the_model_runs_on_no_more_tokens_at_a_time_than_asked_for_and_the_head_on_what_is_read() -> None:
    model, tokenizer = tiny_model("bert"), letter_tokenizer()
    shapes: list[tuple[int, ...]] = []
    rows: list[int] = []
    model.bert.embeddings.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    model.cls.predictions.decoder.register_forward_hook(lambda module, args, out: rows.append(out[..., 0].numel()))
    told: list[int] = []
    pseudo_log_likelihoods(model, tokenizer, TEXTS, max_tokens_per_batch=40, door=None)
    shapes.clear()
    pseudo_log_likelihoods(model, tokenizer, TEXTS, max_tokens_per_batch=40, door="find", advance=told.append)
    used = [shape for shape in shapes if shape[1] != 7]  # the rows on which the door is tried
    assert all(count * length <= 40 for count, length in used)
    assert sum(count for count, _ in used) == sum(told) == sum(len(text) for text in TEXTS)
    assert rows[-len(used) :] == [count for count, _ in used]


def test_log_probabilities_of_other_tokens_are_those_of_a_softmax_and_rows_may_be_unmasked() -> None:
    model = tiny_model("roberta").double()
    ids = torch.tensor([0, 7, 9, 12, 2])
    found = log_probabilities(
        model, [MaskedRow(ids.numpy(), (1, 3), (1, 3)), MaskedRow(ids.numpy(), (), (2,))], 4, candidates=[8, 20]
    )
    with torch.no_grad():
        masked = ids.clone()
        masked[[1, 3]] = 4
        exact = [model(input_ids=row[None]).logits[0].log_softmax(-1) for row in (masked, ids)]
    assert found[0].tolist() == [pytest.approx(exact[0][place, [8, 20]].tolist(), abs=1e-9) for place in (1, 3)]
    assert found[1].tolist() == [pytest.approx(exact[1][2, [8, 20]].tolist(), abs=1e-9)]
