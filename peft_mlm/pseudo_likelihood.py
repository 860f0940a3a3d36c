"""Pseudo-log-likelihoods of texts: how probable a masked LM finds each token, given the others.

A masked LM gives no probability of a text. Its pseudo-log-likelihood (PLL; Salazar et al. 2020,
https://doi.org/10.18653/v1/2020.acl-main.240) stands in for it: each token is masked in turn, and the log
probabilities of the right tokens are summed,

    PLL(W) = sum over t of ln p(w_t | W without w_t).

The later tokens of a long word give its earlier ones away, so that rare words of many tokens score too high. Kauf and
Ivanova 2023 (https://arxiv.org/abs/2305.10588) mask more of the word that a token is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.collator import special_ids_of
from peft_mlm.console import few_names
from peft_mlm.errors import DataError
from peft_mlm.gathered_head import Door, base_of
from peft_mlm.masked_rows import Ids, MaskedRow, Numbers, log_probabilities, mask_id_of
from peft_mlm.positions import position_limit

# What is masked when a token is scored. The names are those of the code that came with the papers.
VARIANTS = {
    "original": "the token alone (Salazar et al. 2020)",
    "within_word_l2r": "the token and those after it in its word (PLL-word-l2r, Kauf and Ivanova 2023)",
    "whole_word": "all tokens of its word (PLL-whole-word, Kauf and Ivanova 2023)",
}
Variant = Literal["original", "within_word_l2r", "whole_word"]


class TextTokens(NamedTuple):
    """A text as a row of the model, and what of it is scored.

    Attributes:
        ids: All tokens, special ones included, (T,).
        scored: Positions of the tokens that are scored, in order.
        words: For each of these, the number of its word.
        unknown: Unknown tokens; they are not scored.
        cut: Tokens that were cut off at the end.
    """

    ids: Ids
    scored: list[int]
    words: list[int]
    unknown: int
    cut: int


@dataclass(frozen=True)
class PseudoLikelihood:
    """What a model thinks of a text.

    Attributes:
        token_ids: The tokens that were scored, (tokens,).
        log_probabilities: ln p of each of them, in nats, (tokens,).
        unknown: Unknown tokens of the text; they are not scored.
        cut: Tokens that were cut off since the model holds no more.
    """

    token_ids: Ids
    log_probabilities: Numbers
    unknown: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens were scored: all that are not special."""
        return len(self.log_probabilities)

    @property
    def log_likelihood(self) -> float:
        """The pseudo-log-likelihood: the sum of the log probabilities, in nats; 0 for a text without tokens."""
        return math.fsum(self.log_probabilities)

    @property
    def pseudo_perplexity(self) -> float:
        """exp(-log_likelihood / tokens); nan for a text without tokens, inf beyond a float."""
        return pseudo_perplexity(self.log_likelihood, self.tokens)


def pseudo_perplexity(log_likelihood: float, tokens: int) -> float:
    """Compute the pseudo-perplexity of one text or of many (Salazar et al. 2020).

    Args:
        log_likelihood: Sum of the pseudo-log-likelihoods, in nats.
        tokens: Number of tokens in the sum.

    Returns:
        exp(-log_likelihood / tokens); nan for no tokens, inf beyond a float.
    """
    if not tokens:
        return math.nan
    try:
        return math.exp(-log_likelihood / tokens)
    except OverflowError:
        return math.inf


def pseudo_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    variant: Variant = "original",
    truncate: bool = False,
    max_tokens_per_batch: int | None = None,
    door: Door | Literal["find"] | None = "find",
    advance: Callable[[int], Any] = lambda tokens: None,
) -> list[PseudoLikelihood]:
    """Score texts: each token masked in turn, alone or with others of its word (`VARIANTS`).

    Special tokens, unknown and mask tokens in a text included, are never scored: no model was trained to predict them.
    A word is what the tokenizer takes apart before it looks for tokens, at white space and mostly at punctuation too;
    tokenizers that do not tell (those written in Python) have words of one token.

    Args:
        model: A masked LM, with or without an adapter; it is run where it is, in evaluation mode.
        tokenizer: Its tokenizer.
        texts: The texts.
        variant: What is masked with a token: a name in `VARIANTS`.
        truncate: Cut texts that are longer than the model holds; else they are refused.
        max_tokens_per_batch: As in `masked_rows.log_probabilities`.
        door: As there.
        advance: Is told after each batch how many tokens were scored.

    Returns:
        A score for each text, in order.

    Raises:
        DataError: A text is longer than the model holds.
        ModelError: The tokenizer has no mask token.
    """
    found = encode_texts(tokenizer, texts, model, truncate=truncate)
    rows = [row for text in found for row in masked_rows(text, variant)]
    options: dict[str, Any] = {"max_tokens_per_batch": max_tokens_per_batch, "door": door, "advance": advance}
    values = iter(log_probabilities(model, rows, mask_id_of(tokenizer), **options))
    scores = []
    for text in found:
        numbers = np.array([float(next(values)[0]) for _ in text.scored], np.float64)
        scores.append(PseudoLikelihood(text.ids[text.scored], numbers, text.unknown, text.cut))
    return scores


def masked_rows(text: TextTokens, variant: Variant) -> list[MaskedRow]:
    """Make a masked row for each token that is scored.

    Example: of the word "souvenir" in the tokens "so", "##uven", "##ir", all three are masked for the first, the last
    two for the second, and the last one for itself ("within_word_l2r").

    Args:
        text: From `encode_texts`.
        variant: A name in `VARIANTS`.

    Returns:
        A row for each scored token, in order.
    """
    together: dict[int, list[int]] = {}
    for position, word in zip(text.scored, text.words, strict=True):
        together.setdefault(word, []).append(position)
    rows = []
    for position, word in zip(text.scored, text.words, strict=True):
        masked = {
            "original": [position],
            "within_word_l2r": [other for other in together[word] if other >= position],
            "whole_word": together[word],
        }[variant]
        rows.append(MaskedRow(text.ids, masked, [position]))
    return rows


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel,
    *,
    truncate: bool = False,
    first: int = 1,
) -> list[TextTokens]:
    """Turn texts into rows, and find what of them is scored.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        model: The masked LM, whose positions are the limit.
        truncate: Cut longer texts.
        first: Number of the first text, for messages.

    Returns:
        The rows, in order.

    Raises:
        DataError: A text is longer than the model holds, and `truncate` is off.
    """
    if not texts:
        return []
    limit = position_limit(base_of(model))
    special, unknown_id = set(special_ids_of(tokenizer)), tokenizer.unk_token_id
    options: dict[str, Any] = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoded = tokenizer(list(texts), return_attention_mask=False, **options)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    long = [number for number, length in enumerate(lengths) if limit is not None and length > limit]
    if long and not truncate:
        told = few_names([f"{first + number} ({lengths[number]} tokens)" for number in long])
        raise DataError(
            f"The model holds {limit} tokens, and longer are the texts {told}. Shorten "
            "them, or cut them off by --truncate."
        )
    if long:
        encoded = tokenizer(list(texts), return_attention_mask=False, truncation=True, max_length=limit, **options)
    found = []
    for number, text in enumerate(texts):
        ids = np.array(encoded["input_ids"][number], np.int64)
        scored = [place for place, token in enumerate(ids.tolist()) if token not in special]
        words = list(range(len(scored)))
        if tokenizer.is_fast:
            words = _words(text, encoded.word_ids(number), encoded["offset_mapping"][number], scored)
        unknown = 0 if unknown_id is None else int((ids == unknown_id).sum())
        found.append(TextTokens(ids, scored, words, unknown, lengths[number] - len(ids)))
    return found


def _words(
    text: str, word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]], scored: Sequence[int]
) -> list[int]:
    """Number the words that scored tokens are in.

    A word ends where the tokenizer takes the text apart, and at white space: some tokenizers (SentencePiece's without
    a step before it) take a whole text for one word.
    """
    words: list[int] = []
    for place, position in enumerate(scored):
        if place == 0:
            words.append(0)
            continue
        before = scored[place - 1]
        end, start = offsets[before][1], offsets[position][0]
        # Pieces of one character, as byte-level tokens are, all have that character's place.
        parted = start >= end and any(letter.isspace() for letter in text[end : start + 1])
        same = word_ids[position] == word_ids[before] and before == position - 1 and not parted
        words.append(words[-1] if same else words[-1] + 1)
    return words
