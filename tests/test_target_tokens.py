"""Words a user names -> tokens, in each kind of vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, pipeline

from peft_mlm.errors import DataError
from peft_mlm.target_tokens import SPACE, START, WORD, Words, before_masks, token_finder, tokens_at
from tests.tiny import letter_tokenizer, tiny_model

TEXT = ["the pain is in the spain of the brain (pain) é caffè unseen unable able pained", "pain unpaid, able été"] * 40


def byte_level() -> PreTrainedTokenizerBase:
    """As RoBERTa's: a space belongs to the word after it; the mask takes the space before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>"], show_progress=False))


def sentence_piece() -> PreTrainedTokenizerBase:
    """As XLM-R's: a word begins with ▁."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" {2,}", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, max_piece_length=6
    )
    return _trained(backend, trainer)


def _trained(backend: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerBase:
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token=AddedToken("<mask>", lstrip=True), pad_token="<pad>"
    )


def word_piece() -> PreTrainedTokenizerBase:
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "[MASK]",
        "pain",
        "##pain",
        "able",
        "##able",
        "un",
        "(",
        "a",
        "##a",
        "-",
    ]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, do_lower_case=True)


def spelled(tokenizer: PreTrainedTokenizerBase, word: str, before: str) -> str:
    (found,) = tokens_at(token_finder(tokenizer), Words("targets", [word]), before)
    return str(tokenizer.convert_ids_to_tokens(found))


def test_what_stands_before_each_mask_is_told() -> None:
    text = "<mask> un<mask>able, <mask>-<mask><mask>\t<mask>(<mask> é<mask>"
    assert list(before_masks(text, "<mask>")) == [START, WORD, SPACE, "-", WORD, SPACE, "(", WORD]
    assert list(before_masks("none", "<mask>")) == []


@pytest.mark.parametrize(
    ("make", "start", "space", "inside", "after_bracket"),
    [
        (byte_level, "pain", "Ġpain", "pain", "pain"),
        (sentence_piece, "▁pain", "▁pain", "pain", "pain"),
        (word_piece, "pain", "pain", "##pain", "pain"),
    ],
)
def test_a_word_is_the_token_that_stands_there(
    make: Callable[[], PreTrainedTokenizerBase], start: str, space: str, inside: str, after_bracket: str
) -> None:
    tokenizer = make()
    assert spelled(tokenizer, "pain", START) == start
    assert spelled(tokenizer, "pain", SPACE) == space
    assert spelled(tokenizer, "pain", WORD) == inside
    assert spelled(tokenizer, "pain", "(") == after_bracket


@pytest.mark.parametrize("before", [START, SPACE, WORD, "("])
@pytest.mark.parametrize(("make", "piece"), [(byte_level, "Ġpain"), (sentence_piece, "▁pain"), (word_piece, "##able")])
def test_a_token_written_as_the_vocabulary_writes_it_is_that_one_everywhere(
    make: Callable[[], PreTrainedTokenizerBase], piece: str, before: str
) -> None:
    assert spelled(make(), piece, before) == piece


def test_the_token_is_the_one_that_the_text_itself_would_have() -> None:
    for make in (byte_level, sentence_piece, word_piece):
        tokenizer = make()
        for text in ("<mask> able", "able <mask> able", "able (<mask> able"):
            (before,) = before_masks(text, "<mask>")
            whole = tokenizer(text.replace("<mask>", "pain"), add_special_tokens=False)["input_ids"]
            masked = tokenizer(text.replace("<mask>", str(tokenizer.mask_token)), add_special_tokens=False)["input_ids"]
            assert len(whole) == len(masked)
            place = masked.index(tokenizer.mask_token_id)
            assert tokens_at(token_finder(tokenizer), Words("targets", ["pain"]), before) == [whole[place]], text


def test_transformers_own_pipeline_takes_the_end_of_a_word_and_the_first_piece() -> None:
    tokenizer = byte_level()
    model = tiny_model("roberta", vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    (found,) = fill_mask("the <mask> is", targets=["pain"])
    assert tokenizer.convert_ids_to_tokens(found["token"]) == "pain"
    assert spelled(tokenizer, "pain", SPACE) == "Ġpain"
    (found,) = fill_mask("the <mask> is", targets=["painable"])
    assert tokenizer.convert_ids_to_tokens(found["token"]) == "pain"


def test_letters_beyond_ascii_are_found_in_byte_level_vocabularies() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokens_at(token_finder(tokenizer), Words("targets", ["é"]), SPACE)) == " é"
    assert tokenizer.decode(tokens_at(token_finder(tokenizer), Words("targets", ["é"]), WORD)) == "é"


def test_a_lower_casing_tokenizer_takes_any_case() -> None:
    assert spelled(word_piece(), "PAIN", SPACE) == "pain"
    assert spelled(word_piece(), "PAIN", WORD) == "##pain"


@pytest.mark.parametrize("before", [START, SPACE, WORD, "-"])
def test_residues_are_the_same_wherever_they_stand(before: str) -> None:
    assert [spelled(letter_tokenizer(), letter, before) for letter in "ACT"] == ["A", "C", "T"]


@pytest.mark.parametrize(
    ("make", "word", "before", "said"),
    [
        (word_piece, "painable", SPACE, "not one token after a space: 'painable' is pain + ##able"),
        (word_piece, "painable", WORD, "not one token within a word: 'painable' is ##pain + ##able"),
        (word_piece, "zebra", START, "at the start of a text: 'zebra' is unknown"),
        (byte_level, "painable", SPACE, "'painable' is Ġpain + able"),
        (byte_level, "painable", WORD, "'painable' is pain + able"),
        (letter_tokenizer, "AC", START, "'AC' is A + C"),
        (letter_tokenizer, "z", START, "'z' is unknown"),
        (letter_tokenizer, " ", START, "' ' is nothing"),
    ],
)
def test_what_is_not_one_token_is_refused_with_its_pieces(
    make: Callable[[], PreTrainedTokenizerBase], word: str, before: str, said: str
) -> None:
    with pytest.raises(DataError) as refused:
        tokens_at(token_finder(make()), Words("targets", [word]), before)
    assert str(refused.value).startswith("targets: not one token")
    assert said in str(refused.value)


def test_of_many_faulty_words_the_first_are_named() -> None:
    with pytest.raises(DataError, match=r"'AB' is A \+ B, .* and 17 more"):
        tokens_at(
            token_finder(letter_tokenizer()), Words("only", [f"A{letter}" for letter in "BCDEFGHIJKLMNOPQRSTA"]), ""
        )
