"""Tokens added to a tokenizer, so that running text finds them as a reader would.

What decides whether text finds an added token are the flags of `tokenizers.AddedToken`, and these depend on the
tokenizer: whether space parts words or is dropped (residues), and whether a space is part of the word after it. Both
are looked at by tokenising a few letters, and every token is tried before it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerBase

from peft_mlm.console import few_names
from peft_mlm.errors import ModelError

SHOWN = 8
# How vocabularies mark a piece within a word, or at its start; text does not hold these marks.
PIECE_MARKS = ("##", "Ġ", "▁")
# Scripts that write words without space between them, or grow them by endings: Thai, Lao, Tibetan, Burmese, Khmer,
# kana, Chinese characters, Hangul.
UNSPACED = re.compile("[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True)
class Reading:
    """How a tokenizer reads text, as far as added tokens must know.

    Attributes:
        spaced: Whether space parts words; False where it is dropped, as between residues.
        space_is_token: Whether a space before an added token would be left over as a token of its own.
        unk_id: Id of what it does not know, or None.
    """

    spaced: bool
    space_is_token: bool
    unk_id: int | None


def add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    special_tokens: Sequence[str] = (),
    *,
    inside_words: bool = False,
) -> list[str]:
    """Add tokens that a tokenizer does not have, and see that it keeps them whole.

    An ordinary token is found as its tokenizer reads text: in any case where it lowers case, and (unless it holds
    other characters at its ends, or the text has no words) as a whole word only: `cat` is not found in `catalog`. A
    special token is found exactly as it is written, and is never masked nor drawn as a random token.

    Args:
        tokenizer: It is changed in place.
        tokens: Ordinary tokens.
        special_tokens: Special tokens; one that exists already counts as special from now on.
        inside_words: Whether ordinary tokens are found inside longer words too (SMILES, text without space).

    Returns:
        Sentences that the user should read: tokens that exist already, and how tokens are found.

    Raises:
        ModelError: A token is in both lists, is a piece of a word rather than text, or cannot be kept whole.
    """
    both = [token for token in tokens if token in special_tokens]
    if both:
        raise ModelError(f"{few_names(both, SHOWN)}: given as an ordinary and as a special token. Leave it out of one.")
    reading = read_reading(tokenizer)
    known = tokenizer.get_vocab()
    notices: list[str] = []
    new = _new_tokens(tokenizer, tokens, reading, notices)
    whole_words = reading.spaced and tokenizer.is_fast and not inside_words
    tokenizer.add_tokens([_ordinary(token, reading, whole_words=whole_words) for token in new])
    marked = [token for token in special_tokens if token in known]
    if marked:
        told = few_names(marked, SHOWN)
        notices.append(f"{told}: in the vocabulary already; special from now on, with the row it has.")
    if special_tokens:
        flags = {"special": True, "normalized": False, "lstrip": reading.space_is_token}
        extra = [AddedToken(token, **flags) for token in special_tokens if token not in tokenizer.all_special_tokens]
        # The default would take the name of special from those that the tokenizer has.
        tokenizer.add_special_tokens({"extra_special_tokens": extra}, replace_extra_special_tokens=False)
    _check_ids(tokenizer, known, [*new, *(token for token in special_tokens if token not in known)])
    _check_whole(tokenizer, [*new, *special_tokens])
    if new and reading.spaced and not tokenizer.is_fast and not inside_words:
        notices.append("This tokenizer (written in Python) finds added tokens inside longer words too.")
    return notices


def read_reading(tokenizer: PreTrainedTokenizerBase) -> Reading:
    """See how a tokenizer reads space, from two ordinary characters of its vocabulary.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        What was seen.
    """
    letter = next((t for t in sorted(tokenizer.get_vocab()) if len(t) == 1 and t.isalpha()), "a")
    together, apart = _ids(tokenizer, letter * 2), _ids(tokenizer, f"{letter} {letter}")
    alone, followed = _ids(tokenizer, letter), _ids(tokenizer, f"{letter} ")
    return Reading(together != apart, len(followed) > len(alone), tokenizer.unk_token_id)


def pieces_of(tokenizer: PreTrainedTokenizerBase, token: str, reading: Reading) -> list[int]:
    """Give the ids of the pieces that a tokenizer splits a token into, unknown ones left out.

    Args:
        tokenizer: A tokenizer that does not have the token.
        token: Any text.
        reading: How that tokenizer reads text.

    Returns:
        Ids in order; none where it knows no piece.
    """
    return [i for i in _ids(tokenizer, _in_text(token, reading)) if i != reading.unk_id]


def _new_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], reading: Reading, notices: list[str]
) -> list[str]:
    """Leave out what is a token already, by itself or as the tokenizer reads it, and refuse marks of pieces."""
    vocabulary = tokenizer.get_vocab()
    marks = [mark for mark in PIECE_MARKS if sum(t.startswith(mark) and len(t) > len(mark) for t in vocabulary) > 1]
    pieces = [token for token in tokens if token.startswith(tuple(marks)) and token not in vocabulary]
    if pieces:
        raise ModelError(
            f"{few_names(pieces, SHOWN)}: this is how the vocabulary writes pieces of words, which text never holds. "
            "Give the "
            "token as it stands in text."
        )
    new: dict[str, str] = {}
    existing, doubled = [], []
    for token in tokens:
        read = _ids(tokenizer, _in_text(token, reading))
        if token in vocabulary or (len(read) == 1 and read[0] != reading.unk_id):
            existing.append(token)
        elif _normal(tokenizer, token) in new:
            doubled.append(f"{token} (as {new[_normal(tokenizer, token)]})")
        else:
            new[_normal(tokenizer, token)] = token
    if existing:
        notices.append(f"{few_names(existing, SHOWN)}: in the vocabulary already, nothing to add.")
    if doubled:
        notices.append(f"{few_names(doubled, SHOWN)}: the tokenizer reads them alike, so one is added.")
    return list(new.values())


def _ordinary(token: str, reading: Reading, *, whole_words: bool) -> AddedToken:
    word = re.fullmatch(r"\w(.*\w)?", token, re.DOTALL) is not None and UNSPACED.search(token) is None
    return AddedToken(token, single_word=whole_words and word, lstrip=reading.space_is_token, normalized=True)


def _check_ids(tokenizer: PreTrainedTokenizerBase, known: dict[str, int], added: Sequence[str]) -> None:
    """Refuse ids that another token has: some vocabularies have gaps, and counting on from their size hits one."""
    taken = set(known.values())
    vocabulary = tokenizer.get_vocab()
    hit = [token for token in added if vocabulary.get(token) in taken]
    if hit:
        raise ModelError(
            f"{few_names(hit, SHOWN)}: the tokenizer gives an id that another of its tokens has; its vocabulary has "
            "gaps. Give a "
            "tokenizer that holds the new tokens, by --tokenizer_name."
        )


def _check_whole(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Try each token: alone, and twice with a space between."""
    vocabulary = tokenizer.get_vocab()
    split = []
    for token in tokens:
        own = vocabulary.get(token)
        if own is None or _ids(tokenizer, token) != [own] or _ids(tokenizer, f"{token} {token}").count(own) != 2:
            split.append(token)
    if split:
        raise ModelError(
            f"{few_names(split, SHOWN)}: the tokenizer does not keep it whole ({type(tokenizer).__name__} reads "
            f"{split[0]!r} as {tokenizer.tokenize(split[0])}). Give it as the tokenizer reads text (in lower case, "
            "without accents, ...), or leave it out."
        )


def _normal(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    return token if normalizer is None else normalizer.normalize_str(token)


def _in_text(token: str, reading: Reading) -> str:
    """Write a token as it stands in text: where a space is part of the word after it, with one."""
    return f" {token}" if reading.space_is_token else token


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
