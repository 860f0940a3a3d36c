"""Added tokens in running text, for tokenizers that read text in different ways."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    EsmTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

from peft_mlm import collator
from peft_mlm.errors import ModelError
from peft_mlm.tokenizer import add_tokens
from tests.tiny import letter_tokenizer

RESIDUES = "LAGVSERTIDPKQNFYMHWC"


@pytest.fixture(scope="module")
def minilm_tokenizer(minilm_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture
def uncased(minilm_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return copy.deepcopy(minilm_tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's: a space is part of the word after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the patient took aspirin for pain and the cat sat"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", pad_token="<pad>", cls_token="<s>"
    )


def sentence_pieces() -> PreTrainedTokenizerBase:
    """As XLM-R's: words start with a mark for the space."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in ("took", "for", "the", "cat")]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz▁(),."]
    return XLMRobertaTokenizer(vocab=pieces)


def residues(folder: Path) -> PreTrainedTokenizerBase:
    """ESM's own tokenizer, written in Python."""
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return EsmTokenizer(vocab_file=str(folder / "vocab.txt"))


def test_a_word_is_found_in_any_case_and_beside_punctuation_but_not_inside_others(
    uncased: PreTrainedTokenizerBase,
) -> None:
    plain = uncased.tokenize("Catabolic bobkat, vec cats")
    add_tokens(uncased, ["Pembrolizumab", "kat", "IL-6", "cata", "vec."])
    text = "took PEMBROLIZUMAB, Pembrolizumab and (pembrolizumab)-like kat; kat's il-6."
    assert uncased.tokenize(text) == [
        "took", "pembrolizumab", ",", "pembrolizumab", "and", "(", "pembrolizumab", ")", "-", "like", "kat", ";",
        "kat", "'", "s", "il-6", ".",
    ]  # fmt: skip
    assert uncased.tokenize("Catabolic bobkat, vec cats") == plain


def test_inside_words_too_when_asked(uncased: PreTrainedTokenizerBase) -> None:
    add_tokens(uncased, ["Qzx"], inside_words=True)
    assert uncased.tokenize("aQZXb") == ["a", "qzx", "b"]


def test_scripts_without_space_are_found_in_running_text(uncased: PreTrainedTokenizerBase) -> None:
    add_tokens(uncased, ["阿司匹林", "[odd]"])
    assert uncased.convert_tokens_to_ids("阿司匹林") in uncased("他服用阿司匹林止痛")["input_ids"]
    assert "[odd]" in uncased.tokenize("a[odd]b")


def test_the_library_default_splits_a_longer_word_that_ours_leaves_alone(uncased: PreTrainedTokenizerBase) -> None:
    default = copy.deepcopy(uncased)
    default.add_tokens(["kat"])
    assert default.tokenize("katabolic") != uncased.tokenize("katabolic")
    before = uncased.tokenize("katabolic")
    add_tokens(uncased, ["kat"])
    assert uncased.tokenize("katabolic") == before


def test_a_space_before_an_added_token_leaves_no_token_of_its_own() -> None:
    default, ours = byte_level(), byte_level()
    default.add_tokens(["zyx"])
    assert default.tokenize("took zyx for")[1] == "Ġ"
    add_tokens(ours, ["zyx"], ["[DRUG]"])
    ids = ours("took zyx for (zyx) [DRUG] for", add_special_tokens=False)["input_ids"]
    assert ids.count(ours.convert_tokens_to_ids("zyx")) == 2
    lone = ours.convert_tokens_to_ids("Ġ")
    assert ids.count(lone) == ours("(", add_special_tokens=False)["input_ids"].count(lone) + 1  # of " ("
    assert "zyx" not in ours.tokenize("took zyxa")


def test_words_with_a_mark_for_space_are_kept_whole() -> None:
    tokenizer = sentence_pieces()
    add_tokens(tokenizer, ["zyx"])
    text = "took zyx for zyx, zyxa"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("zyx")) == 2


def test_residues_are_found_inside_a_sequence_by_fast_and_python_tokenizers(tmp_path: Path) -> None:
    for tokenizer, text in ((letter_tokenizer(), "ABBHHHHHHAB"), (residues(tmp_path), "LAGHHHHHHLA")):
        notices = add_tokens(tokenizer, ["HHHHHH"])
        assert "HHHHHH" in tokenizer.tokenize(text), type(tokenizer)
        assert notices == []
        assert len(tokenizer.tokenize(text)) == 6
    saved = residues(tmp_path)
    add_tokens(saved, ["HHHHHH"], ["<tag>"])
    saved.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == saved.get_vocab()
    assert "<tag>" in again.all_special_tokens


def test_what_exists_is_told_and_skipped(uncased: PreTrainedTokenizerBase) -> None:
    size = len(uncased)
    told = add_tokens(uncased, ["cat", "Cat", "Nivolumab", "nivolumab"])
    assert told == [
        "cat, Cat: in the vocabulary already, nothing to add.",
        "nivolumab (as Nivolumab): the tokenizer reads them alike, so one is added.",
    ]
    assert len(uncased) == size + 1
    roberta = byte_level()
    assert add_tokens(roberta, ["patient"]) == ["patient: in the vocabulary already, nothing to add."]


def test_a_special_token_is_never_masked_nor_drawn_and_others_stay_special(uncased: PreTrainedTokenizerBase) -> None:
    uncased.add_special_tokens({"extra_special_tokens": ["[OLD]"]})
    told = add_tokens(uncased, ["Nivolumab"], ["[DRUG]", "[unused5]"])
    assert told == ["[unused5]: in the vocabulary already; special from now on, with the row it has."]
    special = {uncased.convert_tokens_to_ids(token) for token in ("[OLD]", "[DRUG]", "[unused5]")}
    assert special <= set(uncased.all_special_ids)
    assert uncased.tokenize("[DRUG]x [drug]")[0] == "[DRUG]"
    masking = collator.from_tokenizer(uncased, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0)
    assert not special & set(masking.random_ids.tolist())
    assert uncased.convert_tokens_to_ids("Nivolumab") in masking.random_ids
    row = uncased("[DRUG] Nivolumab [OLD] [unused5] pain")["input_ids"]
    labels = masking([{"input_ids": row}])["labels"][0].tolist()
    assert [label for label in labels if label >= 0] == uncased.convert_tokens_to_ids(["Nivolumab", "pain"])


def test_a_token_added_as_special_without_a_role_is_not_masked_either(uncased: PreTrainedTokenizerBase) -> None:
    """`add_tokens(special_tokens=True)` leaves a token out of all_special_ids."""
    uncased.add_tokens(["[SPEAKER]"], special_tokens=True)
    masking = collator.from_tokenizer(uncased, mlm_probability=1.0)
    labels = masking([{"input_ids": uncased("[SPEAKER] pain")["input_ids"]}])["labels"]
    assert uncased.convert_tokens_to_ids("[SPEAKER]") not in labels


@pytest.mark.parametrize(
    ("tokens", "special", "said"),
    [
        (["##mab"], [], "##mab: this is how the vocabulary writes pieces of words"),
        (["[X]"], ["[X]"], "given as an ordinary and as a special token"),
        (["\u0301"], [], "does not keep it whole"),
    ],
)
def test_what_text_can_never_hold_is_refused(
    tokens: list[str], special: list[str], said: str, uncased: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ModelError) as caught:
        add_tokens(uncased, tokens, special)
    assert said in str(caught.value)


def test_a_vocabulary_with_gaps_is_refused_where_an_id_would_be_given_twice() -> None:
    """The library counts on from the number of tokens, and hits an id that is taken."""
    tokens = {token: i for i, token in enumerate(["<pad>", "<unk>", "<mask>", "a", "b"])} | {"c": 6}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    )
    default = copy.deepcopy(tokenizer)
    default.add_tokens(["new"])
    assert default.get_vocab()["new"] == default.get_vocab()["c"]
    with pytest.raises(ModelError, match="its vocabulary has gaps"):
        add_tokens(tokenizer, ["new"])
