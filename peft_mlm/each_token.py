"""Each token of a text masked in turn: what a base, and each adapter on it, would write there.

The sum over these tokens is the pseudo-log-likelihood of `pseudo_likelihood.py` (Salazar et al. 2020); beside the
probability of the right token stands the most probable one, so that it is seen where an adapter would write another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft_mlm.errors import DataError
from peft_mlm.masked_rows import batches_of
from peft_mlm.predicting import Predictor, rank_of, shown_token
from peft_mlm.pseudo_likelihood import TextTokens, encode_texts, pseudo_perplexity
from peft_mlm.side_by_side import Sides


class View(NamedTuple):
    """What a model says where a token is masked.

    Attributes:
        log_probability: ln p of the right token, in nats.
        rank: Of the right token, 1 being the most probable.
        best_id: The most probable token.
        best_probability: Its probability.
    """

    log_probability: float
    rank: int
    best_id: int
    best_probability: float


def each_token(sides: Sides, predictor: Predictor, text: str) -> dict[str, Any]:
    """Mask each token of a text in turn, and ask all models for it.

    Args:
        sides: The models.
        predictor: Made for one of them.
        text: Without masks.

    Returns:
        `text`; `sides`: per model `name` (None for the base), `log_likelihood` (nats), `pseudo_perplexity`; `tokens`:
        per token that is not special `token`, `token_id`, `start` and `end` (its place in
        the text; None where the tokenizer does not tell), and `views`, one for each model in the order of `sides`:
        `probability`, `rank` (of this token), `best`, `best_id`, `best_probability` (of the most probable one);
        `unknown`: how many tokens the tokenizer does not know, which are not scored.

    Raises:
        DataError: The text is longer than the model holds, or has no token.
    """
    tokenizer = predictor.tokenizer
    first = sides.loaded(next(iter(sides.sides)))
    (tokens,) = encode_texts(tokenizer, [text], first.model)
    if not tokens.scored:
        raise DataError("There is no token to predict in this text: write one that the tokenizer knows.")
    views = {name: _views(predictor, sides.loaded(name).model, tokens) for name in sides.sides}
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"] if tokenizer.is_fast else None
    return {
        "text": text,
        "sides": [_totals(name, found) for name, found in views.items()],
        "tokens": [
            {
                "token": shown_token(tokenizer, int(tokens.ids[position])),
                "token_id": int(tokens.ids[position]),
                "start": None if offsets is None else offsets[position][0],
                "end": None if offsets is None else offsets[position][1],
                "views": [_described(predictor, found[place]) for found in views.values()],
            }
            for place, position in enumerate(tokens.scored)
        ],
        "unknown": tokens.unknown,
    }


def _views(predictor: Predictor, model: Any, tokens: TextTokens) -> list[View]:
    rows = torch.from_numpy(tokens.ids).repeat(len(tokens.scored), 1)
    own = torch.arange(len(tokens.scored))
    at_token = torch.zeros_like(rows, dtype=torch.bool)
    at_token[own, torch.tensor(tokens.scored)] = True
    right = rows[at_token].tolist()
    rows[at_token] = predictor.mask_id
    found: list[View] = []
    for batch in batches_of([rows.shape[1]] * len(rows), predictor.max_tokens):
        answers = iter([right[number] for number in batch])
        found += predictor.at(model, rows[batch], at_token[batch], lambda row: _view(row, next(answers)))  # noqa: B023
    return found


def _view(logits: torch.Tensor, token_id: int) -> View:
    log_probabilities = logits.log_softmax(-1)
    best = int(logits.argmax())
    log_probability, rank = float(log_probabilities[token_id]), rank_of(logits, token_id)
    return View(log_probability, rank, best, math.exp(float(log_probabilities[best])))


def _described(predictor: Predictor, view: View) -> dict[str, Any]:
    return {
        "probability": math.exp(view.log_probability),
        "rank": view.rank,
        "best": shown_token(predictor.tokenizer, view.best_id),
        "best_id": view.best_id,
        "best_probability": view.best_probability,
    }


def _totals(name: str | None, views: Sequence[View]) -> dict[str, Any]:
    total = math.fsum(view.log_probability for view in views)
    return {"name": name, "log_likelihood": total, "pseudo_perplexity": pseudo_perplexity(total, len(views))}
