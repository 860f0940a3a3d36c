"""Each word encoded once: what a fast tokenizer gives for texts, several times faster than it gives it itself.

Most words of a text have stood in it before. A fast tokenizer cuts a text at its spaces and encodes each word by
itself: the ids of a text are those of its first word, then those of each further word with a space before it. These are
kept, and put together by array arithmetic.

That holds for tokenizers made of the parts below, and for words that no rule reaches across: a text that holds any
other is encoded whole. So are all texts, if the first ones come out different, or if few words occur again (as in
protein sequences, which have no spaces).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]

LONGEST_WORD = 64
# How many characters of words are kept, then all is forgotten: about 60 MB.
CHARACTERS_KEPT = 2**21
PROVED_TEXTS = 64
# After so many words, the share that had to be encoded decides whether keeping them pays.
WORDS_BEFORE_VERDICT, LARGEST_SHARE = 20_000, 0.5

_NORMALIZERS = {
    *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Replace", "Sequence"),
    *("Strip", "StripAccents"),
}
# Patterns that find no space to replace where there is one between two words.
_SEVERAL_SPACES = {" {2,}", r"\s{2,}|[\n\r\t]"}
# Those that cut at each space, and those that only cut further.
_CUT_AT_SPACES = {"BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit"}
_CUT_FURTHER = {"Digits", "Punctuation", "Sequence"}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"}
# What may belong to the space before it, as an accent does.
_JOIN_WHAT_IS_BEFORE = {"Mn", "Mc", "Me", "Lm", "Sk"}


class WordMemo:
    """Encodes texts without special tokens.

    Args:
        backend: The Rust tokenizer; its truncation and padding are off.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.added = set(backend.get_added_tokens_decoder())
        self.active = encodes_words_alone(backend)
        self.proved = False
        self.seen = self.encoded = 0
        self._forget()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode texts.

        Args:
            texts: Any number of texts.

        Returns:
            The ids of all texts end to end, and the number of ids of each text.
        """
        if self.active and texts and not self.proved:
            self.proved = True
            some = texts[:PROVED_TEXTS]
            (ids, lengths), (wanted, their_lengths) = self._by_words(some), self._whole(some)
            self.active = np.array_equal(ids, wanted) and np.array_equal(lengths, their_lengths)
        return self._by_words(texts) if self.active and texts else self._whole(texts)

    def _whole(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return joined([encoding.ids for encoding in self._run(texts)])

    def _run(self, texts: Sequence[str]) -> list[Encoding]:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def _forget(self) -> None:
        numbers, self.new = count(), list[str]()
        self.first, self.further = _Numbers(numbers, self.new, ""), _Numbers(numbers, self.new, " ")
        self.ids, self.lengths, self.starts = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)
        self.reaches_across = np.empty(0, np.bool_)
        self.characters = 0

    def _by_words(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        words = [text.split(" ") for text in texts]
        counts = np.fromiter(map(len, words), np.int64, len(words))
        starts = np.cumsum(counts) - counts
        is_first = np.zeros(counts.sum(), np.bool_)
        is_first[starts] = True
        numbers = np.empty(len(is_first), np.int64)
        numbers[is_first] = np.fromiter(map(self.first.__getitem__, (some[0] for some in words)), np.int64, len(words))
        further = chain.from_iterable(some[1:] for some in words)
        numbers[~is_first] = np.fromiter(map(self.further.__getitem__, further), np.int64, len(numbers) - len(words))
        self._count(len(numbers), len(self.new))
        self._learn()
        ids, lengths, at = self.ids, self.lengths, self.starts
        across = np.logical_or.reduceat(self.reaches_across[numbers], starts)
        if across.any():
            # Such a text takes the place of its first word, at the end of the table.
            more, more_lengths = self._whole([texts[i] for i in np.flatnonzero(across).tolist()])
            numbers[starts[across]] = len(lengths) + np.arange(len(more_lengths))
            kept = is_first | ~np.repeat(across, counts)
            at = np.concatenate([at, len(ids) + np.cumsum(more_lengths) - more_lengths])
            ids, lengths = np.concatenate([ids, more]), np.concatenate([lengths, more_lengths])
            counts = np.where(across, 1, counts)
            numbers, starts = numbers[kept], np.cumsum(counts) - counts
        of_word = lengths[numbers]
        shift = at[numbers] - (np.cumsum(of_word) - of_word)
        result = ids[np.arange(of_word.sum()) + np.repeat(shift, of_word)]
        if self.characters > CHARACTERS_KEPT or not self.active:
            self._forget()
        return result, np.add.reduceat(of_word, starts)

    def _count(self, seen: int, encoded: int) -> None:
        self.seen, self.encoded = self.seen + seen, self.encoded + encoded
        self.active = self.seen < WORDS_BEFORE_VERDICT or self.encoded <= LARGEST_SHARE * self.seen

    def _learn(self) -> None:
        """Encode the words that were not seen before."""
        if not self.new:
            return
        alone = [stands_alone(word.removeprefix(" ")) for word in self.new]
        rows = [
            encoding.ids
            for encoding in self._run([word if is_ else "" for word, is_ in zip(self.new, alone, strict=True)])
        ]
        across = [not (is_ and self.added.isdisjoint(ids)) for is_, ids in zip(alone, rows, strict=True)]
        ids, lengths = joined(rows)
        self.starts = np.concatenate([self.starts, len(self.ids) + np.cumsum(lengths) - lengths])
        self.ids, self.lengths = np.concatenate([self.ids, ids]), np.concatenate([self.lengths, lengths])
        self.reaches_across = np.concatenate([self.reaches_across, np.array(across)])
        self.characters += sum(map(len, self.new))
        self.new.clear()


class _Numbers(dict[str, int]):
    """Numbers words as they come; `new` gets those that came for the first time, with what stands before them."""

    def __init__(self, numbers: Iterator[int], new: list[str], before: str) -> None:
        self.numbers, self.new, self.before = numbers, new, before

    def __missing__(self, word: str) -> int:
        number = self[word] = next(self.numbers)
        self.new.append(self.before + word)
        return number


def joined(rows: Sequence[Sequence[int]]) -> tuple[Ids, Lengths]:
    """Lay lists of ids end to end.

    Args:
        rows: Lists of ids.

    Returns:
        All ids, and the length of each list.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def stands_alone(word: str) -> bool:
    """Tell whether no normalisation reaches from a word over the space before or after it.

    Args:
        word: Part of a text between two spaces.

    Returns:
        False for a word with other white space or characters of no width, for one that starts with an accent or the
        like, and for none (two spaces in a row).
    """
    if not 0 < len(word) <= LONGEST_WORD or not word.isprintable():
        return False
    return word[0].isascii() or unicodedata.category(word[0]) not in _JOIN_WHAT_IS_BEFORE


def encodes_words_alone(backend: Tokenizer) -> bool:
    """Tell whether a tokenizer consists of parts that work on each word by itself.

    Args:
        backend: The Rust tokenizer.

    Returns:
        True if the ids of a text are those of its words, one after the other.
    """
    cuts = list(_parts(backend.pre_tokenizer))
    kinds = {part["type"] for part in cuts}
    return (
        all(map(_leaves_spaces, _parts(backend.normalizer)))
        and bool(kinds & _CUT_AT_SPACES)
        and kinds <= _CUT_AT_SPACES | _CUT_FURTHER
        and all(part.get("use_regex", True) and part.get("split", True) for part in cuts)
        and type(backend.model).__name__ in _MODELS
        and getattr(backend.model, "dropout", None) is None
        and all(part["type"] in _POST_PROCESSORS for part in _parts(backend.post_processor))
        and not any(map(_has_space, backend.get_added_tokens_decoder().values()))
    )


def _leaves_spaces(part: dict[str, Any]) -> bool:
    """Let pass what changes no single space between two words."""
    if part["type"] == "Replace":
        (kind, pattern), content = next(iter(part["pattern"].items())), part["content"]
        if kind == "Regex":
            return pattern in _SEVERAL_SPACES and content == " "
        return " " not in pattern and " " not in content
    return part["type"] in _NORMALIZERS and not part.get("strip_left")


def _has_space(token: Any) -> bool:
    return any(map(str.isspace, token.content))


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Give the settings of a part of a tokenizer and of the parts in it."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        for name in ("normalizers", "pretokenizers", "processors"):
            waiting += part.get(name, ())
