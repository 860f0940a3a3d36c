"""Texts with masks -> the most probable tokens for each mask.

All masks of a text are in place while each is predicted, as in training: several are predicted independently of one
another. Texts of as many tokens make a batch, so that nothing is padded and no text changes another's answer, whatever
the model does with padding. The head runs at the masks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.errors import DataError
from peft_mlm.gathered_head import Door, base_of, find_door, sum_over_masked
from peft_mlm.loading import Loaded
from peft_mlm.masked_rows import batch_tokens, batches_of, mask_id_of, to_gpu
from peft_mlm.positions import position_limit
from peft_mlm.target_tokens import TokenFinder, Words, before_masks, token_finder, tokens_at

# Spellings of the mask that are replaced by the tokenizer's own.
MASK_SPELLINGS = ("[MASK]", "<mask>")
# With fewer texts there is no progress bar.
MANY_TEXTS = 200
# Letters of a text in a message.
SHOWN = 60
Result = TypeVar("Result")


@dataclass(frozen=True)
class Question:
    """What is asked at each mask.

    Attributes:
        top_k: How many of the most probable tokens are given.
        targets: Words whose probabilities and ranks are given too.
        only: Words among which the prediction is made; all tokens if empty.
    """

    top_k: int = 5
    targets: Sequence[str] = ()
    only: Sequence[str] = ()


@dataclass(frozen=True)
class MaskedText:
    """A text as tokens.

    Attributes:
        text: With the tokenizer's own mask token.
        input_ids: Its tokens.
        positions: Where the masks are among them.
        before: Per mask what stands before it (`target_tokens.before_masks`).
    """

    text: str
    input_ids: list[int]
    positions: list[int]
    before: list[str]


def with_own_mask(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Write the masks of a text, `[MASK]` or `<mask>`, as the tokenizer does.

    Args:
        tokenizer: Its mask token is used.
        text: Any text.

    Returns:
        The text with the tokenizer's mask token.
    """
    for spelling in MASK_SPELLINGS:
        text = text.replace(spelling, str(tokenizer.mask_token))
    return text


def read_masks(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None) -> MaskedText:
    """Find the masks of a text.

    Args:
        tokenizer: Of the model.
        text: With one mask or several: the tokenizer's mask token, `[MASK]` or `<mask>`.
        limit: How many tokens the model holds; None for any number.

    Returns:
        The text as tokens.

    Raises:
        DataError: There is no mask in the text, or it is too long.
    """
    text = with_own_mask(tokenizer, text)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    positions = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
    if not positions:
        shown = f"{text[:SHOWN]!r}{'...' if len(text) > SHOWN else ''}"
        raise DataError(f"There is no mask in {shown}. Write {tokenizer.mask_token} where a token is to be predicted.")
    check_length(ids, text, limit)
    before = list(before_masks(text, str(tokenizer.mask_token)))
    if len(before) != len(positions):  # a tokenizer that reads its mask in other spellings too
        before = [" "] * len(positions)
    return MaskedText(text, ids, positions, before)


def check_length(ids: Sequence[int], text: str, limit: int | None) -> None:
    """Refuse a text that the model does not hold.

    Args:
        ids: Its tokens.
        text: The text, for the message.
        limit: How many tokens the model holds; None for any number.

    Raises:
        DataError: There are more.
    """
    if limit is not None and len(ids) > limit:
        raise DataError(f"A text has {len(ids)} tokens, the model holds {limit}. Shorten it: {text[:SHOWN]!r}...")


class Predictor:
    """Predicts masks with one model after another that share tokenizer and shapes: a base, and adapters on it.

    Args:
        loaded: One of them; models are moved to the GPU where there is one.
        max_tokens_per_batch: Texts of a batch times their tokens, at most; a longer text is a batch of its own. Default
            4096 on a CPU, 32768 elsewhere.

    Raises:
        ModelError: The tokenizer has no mask token.
    """

    def __init__(self, loaded: Loaded, *, max_tokens_per_batch: int | None = None) -> None:
        self.tokenizer = loaded.tokenizer
        self.mask_id = mask_id_of(loaded.tokenizer)
        to_gpu(loaded.model)
        self.max_tokens = max_tokens_per_batch or batch_tokens(loaded.model)
        self.limit = position_limit(loaded.base.model)
        self._doors: dict[int, Door | None] = {}
        self._finder: TokenFinder = token_finder(self.tokenizer)

    def read(self, texts: Sequence[str], question: Question) -> list[MaskedText]:
        """Find the masks of all texts, and look whether what is asked can be answered.

        Args:
            texts: Each with one mask or several.
            question: What will be asked.

        Returns:
            The texts as tokens.

        Raises:
            DataError: A text has no mask or is too long, or a word is not one token at a mask.
        """
        read = [read_masks(self.tokenizer, text, self.limit) for text in texts]
        for before in sorted({before for text in read for before in text.before}):
            self._named(question, before)
        return read

    def predict(self, model: nn.Module, texts: Sequence[MaskedText], question: Question) -> list[dict[str, Any]]:
        """Predict the masked tokens of texts.

        Args:
            model: In evaluation mode.
            texts: From `read`.
            question: What is asked at each mask.

        Returns:
            Per text `text`; `masks`, per mask `position` (in tokens) and `predictions`, the most probable first, each
            with `token`, `token_id`, `probability`; `filled`, the text with the best token at each mask. With `only`,
            predictions have `rank` (among all tokens, the first being 1) and `probability_among` (the probability
            divided by that of all of `only`) too. With `targets`, a mask has `targets`: per word `target`, `token`,
            `token_id`, `probability`, `rank`, and with `only` `probability_among` and `rank_among`, null where the
            word is not one of these.
        """
        asked = {
            before: tuple(torch.tensor(ids, dtype=torch.long) for ids in self._named(question, before))
            for before in {before for text in texts for before in text.before}
        }
        answers: dict[int, dict[str, Any]] = {}
        batches = list(batches_of([len(text.input_ids) for text in texts], self.max_tokens))
        for batch in tqdm(batches, "Predicting", disable=None if len(texts) >= MANY_TEXTS else True):
            chosen = [texts[index] for index in batch]
            ids = torch.tensor([text.input_ids for text in chosen])
            at_masks = ids == self.mask_id
            places = iter([before for text in chosen for before in text.before])
            found = self.at(model, ids, at_masks, lambda row: self._answer(row, question, *asked[next(places)]))  # noqa: B023
            for index, text in zip(batch, chosen, strict=True):
                masks, found = found[: len(text.positions)], found[len(text.positions) :]
                answers[index] = self._record(text, masks)
        return [answers[index] for index in range(len(texts))]

    def at(
        self, model: nn.Module, ids: torch.Tensor, chosen: torch.Tensor, function: Callable[[torch.Tensor], Result]
    ) -> list[Result]:
        """Compute a function of the logits of each chosen position, as `at_positions` does."""
        base = base_of(model)
        if id(base) not in self._doors:
            to_gpu(model)
            self._doors[id(base)] = find_door(base)
        return at_positions(model, ids, chosen, function, door=self._doors[id(base)])

    def _named(self, question: Question, before: str) -> tuple[list[int], list[int]]:
        """Ids of the targets, and of the words of `only`, each once."""
        targets = tokens_at(self._finder, Words("targets", question.targets), before)
        only = tokens_at(self._finder, Words("only", question.only), before)
        return targets, list(dict.fromkeys(only))

    def _answer(
        self, logits: torch.Tensor, question: Question, targets: torch.Tensor, only: torch.Tensor
    ) -> dict[str, Any]:
        probabilities = logits.softmax(-1)
        choice = only if len(only) else torch.arange(len(logits))
        among = logits[choice].softmax(-1)
        _, places = logits[choice].topk(min(question.top_k, len(choice)))
        predictions = [self._token(int(choice[place]), probabilities) for place in places]
        if len(only):
            for prediction, place in zip(predictions, places.tolist(), strict=True):
                prediction |= {
                    "rank": rank_of(logits, prediction["token_id"]),
                    "probability_among": float(among[place]),
                }
        answer: dict[str, Any] = {"predictions": predictions}
        if len(targets):
            answer["targets"] = [
                {
                    "target": word,
                    **self._token(token, probabilities),
                    "rank": rank_of(logits, token),
                    **(_among(logits, among, only, token) if len(only) else {}),
                }
                for word, token in zip(question.targets, targets.tolist(), strict=True)
            ]
        return answer

    def _token(self, token_id: int, probabilities: torch.Tensor) -> dict[str, Any]:
        token = shown_token(self.tokenizer, token_id)
        return {"token": token, "token_id": token_id, "probability": float(probabilities[token_id])}

    def _record(self, text: MaskedText, answers: list[dict[str, Any]]) -> dict[str, Any]:
        filled = list(text.input_ids)
        for place, answer in zip(text.positions, answers, strict=True):
            filled[place] = answer["predictions"][0]["token_id"]
        masks = [{"position": place, **answer} for place, answer in zip(text.positions, answers, strict=True)]
        return {
            "text": text.text,
            "masks": masks,
            "filled": self.tokenizer.decode(filled, skip_special_tokens=True),
        }


def shown_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Write a token for people.

    Args:
        tokenizer: Its tokenizer.
        token_id: The token.

    Returns:
        Its text without space around it; where that is nothing, the token as the vocabulary writes it.
    """
    return str(tokenizer.decode([token_id])).strip() or str(tokenizer.convert_ids_to_tokens(token_id))


def at_positions(
    model: nn.Module,
    ids: torch.Tensor,
    chosen: torch.Tensor,
    function: Callable[[torch.Tensor], Result],
    *,
    door: Door | None = None,
) -> list[Result]:
    """Compute a function of the logits of each chosen position; the head runs there alone.

    Args:
        model: A masked LM in evaluation mode, with or without an adapter.
        ids: Token ids, (B, T), without padding.
        chosen: Which positions, (B, T), one at least.
        function: Takes the logits of one, (V,), on the CPU; float32, or float64 where the model computes in it.
        door: Where their rows are picked before the head (`gathered_head.find_door`); None: after it.

    Returns:
        What the function gives for each, row by row.
    """
    found: list[Result] = []

    def keep(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        rows = (logits if logits.dtype == torch.float64 else logits.float()).cpu()
        found.extend(function(row) for row in rows)
        return logits.new_zeros(())  # what is wanted is kept: nothing is left to sum

    device = base_of(model).device
    ids, chosen = ids.to(device), chosen.to(device)
    labels = torch.where(chosen, ids, IGNORE_INDEX)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        sum_over_masked(model, inputs, labels, keep, door=door)
    return found


def rank_of(logits: torch.Tensor, token_id: int) -> int:
    """Count the tokens that are more probable, and one.

    Args:
        logits: (V,).
        token_id: The token.

    Returns:
        1 for the most probable.
    """
    return int((logits > logits[token_id]).sum()) + 1


def _among(logits: torch.Tensor, among: torch.Tensor, only: torch.Tensor, token: int) -> dict[str, Any]:
    places = (only == token).nonzero()
    if not len(places):
        return {"probability_among": None, "rank_among": None}
    place = int(places[0, 0])
    return {"probability_among": float(among[place]), "rank_among": rank_of(logits[only], place)}
