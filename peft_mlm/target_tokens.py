"""Words that a user names -> the tokens that would stand for them at a mask.

transformers' fill-mask pipeline looks a word up as the vocabulary spells it: in a byte-level or SentencePiece
vocabulary `pain` is then the end of a longer word, not the word after a space; and of a word that is no token it takes
the first piece. Here what stands before the mask decides which token is meant, and a word that is no token is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from peft_mlm.console import few_names
from peft_mlm.errors import DataError
from peft_mlm.tokenizer import PIECE_MARKS, Reading, read_reading

SHOWN = 3
# What stands before a mask: nothing, space, the inside of a word; any other character stands for itself.
START, SPACE, WORD = "", " ", "a"
# How WordPiece marks the rest of a word; and a character that byte-level and SentencePiece vocabularies part from it.
REST = "##"
APART = "("


class Words(NamedTuple):
    """Words that are asked for, and the option they come from, for messages."""

    option: str
    words: Sequence[str]


@dataclass(frozen=True)
class TokenFinder:
    """How a tokenizer spells words; made by `token_finder`.

    Attributes:
        tokenizer: The tokenizer.
        vocabulary: Token to id.
        reading: How it reads space.
        word_pieces: Whether the rest of a word is marked by `##`.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: dict[str, int]
    reading: Reading
    word_pieces: bool


def token_finder(tokenizer: PreTrainedTokenizerBase) -> TokenFinder:
    """Look at how a tokenizer spells words.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        What was seen.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = sum(token.startswith(REST) and len(token) > len(REST) for token in vocabulary)
    return TokenFinder(tokenizer, vocabulary, read_reading(tokenizer), pieces > 1)


def before_masks(text: str, mask_token: str) -> Iterator[str]:
    """Tell what stands before each mask of a text.

    Example:
        >>> list(before_masks("<mask> un<mask>able, <mask>-<mask><mask>", "<mask>"))
        ['', 'a', ' ', '-', 'a']

    Args:
        text: With masks.
        mask_token: How they are written.

    Yields:
        Per mask "" at the start of the text, " " after space, "a" within a word or after another mask, else the
        character itself.
    """
    parts = text.split(mask_token)
    for number, part in enumerate(parts[:-1]):
        last = part[-1:]
        if not last:
            yield WORD if number else START
        elif last.isspace():
            yield SPACE
        else:
            yield WORD if last.isalnum() else last


def tokens_at(finder: TokenFinder, named: Words, before: str) -> list[int]:
    """Find the tokens that words are at a mask.

    A word that is written as the vocabulary writes pieces (`Ġpain`, `▁pain`, `##ing`) is that piece.

    Args:
        finder: Of the tokenizer.
        named: The words.
        before: What stands before the mask, as `before_masks` tells it.

    Returns:
        Ids, one for each word.

    Raises:
        DataError: A word is not one token there; its pieces are named.
    """
    read = [_pieces(finder, word, before) for word in named.words]
    unknown = finder.tokenizer.unk_token_id
    faults = []
    for word, ids in zip(named.words, read, strict=True):
        if len(ids) != 1:
            pieces = " + ".join(finder.tokenizer.convert_ids_to_tokens(ids))
            faults.append(f"{word!r} is {pieces}" if ids else f"{word!r} is nothing to the tokenizer")
        elif ids[0] == unknown and word != finder.tokenizer.unk_token:
            faults.append(f"{word!r} is unknown to the tokenizer")
    if faults:
        where = {START: "at the start of a text", SPACE: "after a space", WORD: "within a word"}
        raise DataError(
            f"{named.option}: not one token {where.get(before, f'after {before!r}')}: {few_names(faults, SHOWN)}. A "
            "mask stands for one token: give words that are tokens, or a token as the vocabulary writes it."
        )
    return [ids[0] for ids in read]


def _pieces(finder: TokenFinder, word: str, before: str) -> list[int]:
    marked = word.startswith(PIECE_MARKS) and not word.startswith(" ")
    if marked and word in finder.vocabulary:
        return [finder.vocabulary[word]]
    if before == START or not finder.reading.spaced:
        return _ids(finder, word)
    if before == SPACE:
        return _after(finder, SPACE, word)
    if before != WORD:
        return _after(finder, before, word)
    if not finder.word_pieces:
        return _after(finder, APART, word)
    # `ning` after `mor` may be one piece with it: the rest of a word is looked up, as WordPiece itself does.
    inside = _ids(finder, word)
    pieces = finder.tokenizer.convert_ids_to_tokens(inside)
    rest = finder.vocabulary.get(f"{REST}{pieces[0]}") if pieces else None
    return inside if rest is None else [rest, *inside[1:]]


def _after(finder: TokenFinder, context: str, word: str) -> list[int]:
    """Read a word after a character, and leave out the tokens that are the character's own."""
    own, both = _ids(finder, context), _ids(finder, context + word)
    return both[len(own) :] if both[: len(own)] == own and len(both) > len(own) else both


def _ids(finder: TokenFinder, text: str) -> list[int]:
    return list(finder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
