"""Texts or mutations -> rows of scores, in steps whose rows do not depend on where a job was stopped.

A step is rows that follow each other in the input, as many as fill some batches; within it they are batched by length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import xxhash

from peft_mlm.errors import DataError
from peft_mlm.fingerprint import base_fingerprint
from peft_mlm.gathered_head import Door, base_of, find_door
from peft_mlm.loading import Loaded
from peft_mlm.masked_rows import to_gpu
from peft_mlm.mutations import MARGINALS, Marginal, check_mutations, encode_protein, mutation_scores, parse_mutation
from peft_mlm.pseudo_likelihood import Variant, encode_texts, pseudo_log_likelihoods

# Tokens of a step: a minute's work for a small model on two cores, or seconds of a GPU's.
CPU_TOKENS_PER_STEP = 2**18
GPU_TOKENS_PER_STEP = 2**23
TEXTS_AT_ONCE = 1000
PSEUDO_LIKELIHOOD = "pseudo_likelihood"
METHODS = (PSEUDO_LIKELIHOOD, *MARGINALS)

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are scored.

    Attributes:
        method: A name in `METHODS`.
        variant: What pseudo-likelihoods mask: a name in `pseudo_likelihood.VARIANTS`.
        truncate: Whether texts that are longer than the model holds are cut.
        token_scores: Whether the scores of single tokens are given too.
        sequence: The wild type of mutations.
        offset: What is added to a residue's place in it to give its number.
        max_tokens_per_batch: As in `masked_rows.log_probabilities`.
    """

    method: str = PSEUDO_LIKELIHOOD
    variant: str = "original"
    truncate: bool = False
    token_scores: bool = False
    sequence: str = ""
    offset: int = 0
    max_tokens_per_batch: int | None = None

    @property
    def score(self) -> str:
        """Name of the column that holds the score."""
        return "pseudo_log_likelihood" if self.method == PSEUDO_LIKELIHOOD else self.method


class Work(NamedTuple):
    """What a model has to do.

    Attributes:
        tokens: Tokens to run for each row of the input, (rows,).
        asks: How many rows the model is run on for a range of the input's.
        score: Scores some rows, given their range and what to tell of the progress; gives columns by name.
    """

    tokens: list[int]
    asks: Callable[[range], int]
    score: Callable[[range, Advance], list[dict[str, Any]]]


def plan_work(loaded: Loaded, texts: Sequence[str], options: ScoreOptions) -> Work:
    """Look at all rows, and refuse at once what cannot be scored; nothing is run yet.

    Args:
        loaded: Model and tokenizer; the model is moved to the GPU where there is one.
        texts: Texts, or mutations.
        options: How to score them.

    Returns:
        What there is to do.

    Raises:
        DataError: A text or the sequence is too long, or a mutation is not one of the sequence.
        ModelError: The tokenizer does not suit.
    """
    to_gpu(loaded.model)
    plan = _plan_texts if options.method == PSEUDO_LIKELIHOOD else _plan_mutations
    return plan(loaded, texts, options, find_door(base_of(loaded.model)))


def steps(tokens: Sequence[int], most: int) -> Iterator[range]:
    """Part rows into steps.

    Args:
        tokens: Tokens of each row.
        most: Tokens of a step, at most; a row with more is a step of its own.

    Yields:
        Ranges that follow each other.
    """
    start = held = 0
    for number, count in enumerate(tokens):
        if held + count > most and number > start:
            yield range(start, number)
            start, held = number, 0
        held += count
    if len(tokens) > start:
        yield range(start, len(tokens))


def tokens_per_step(loaded: Loaded) -> int:
    """Choose the size of a step.

    Args:
        loaded: The model, where it will run.

    Returns:
        Tokens.
    """
    return CPU_TOKENS_PER_STEP if loaded.model.device.type == "cpu" else GPU_TOKENS_PER_STEP


def describe_job(
    models: Sequence[Loaded], rows: Sequence[dict[str, Any]], texts: Sequence[str], options: ScoreOptions
) -> dict[str, Any]:
    """Describe a job by what its results depend on.

    Args:
        models: The model, and the base beside it if that is scored too.
        rows: The input, with all columns.
        texts: What of it is scored.
        options: How.

    Returns:
        Values by name; weights and rows as digests.
    """
    return {
        # The size of batches changes the rounding of sums and nothing else: a job may go on with smaller ones.
        **{name: value for name, value in asdict(options).items() if name != "max_tokens_per_batch"},
        "sequence": _digest(options.sequence) if options.sequence else None,
        "text": _digest([*rows, *texts]),
        "weights": [_digest([loaded.base.fingerprint, base_fingerprint(loaded.model)]) for loaded in models],
        "dtype": str(models[0].model.dtype).removeprefix("torch."),
        "device": models[0].model.device.type,
    }


def columns_of(options: ScoreOptions, *, with_base: bool) -> list[str]:
    """Name the columns that scoring adds.

    Args:
        options: How rows are scored.
        with_base: Whether the base is scored beside the adapter.

    Returns:
        Their names, in order.
    """
    names = [options.score]
    if options.method == PSEUDO_LIKELIHOOD:
        names += ["pseudo_perplexity", "scored_tokens", "unknown_tokens"]
        names += ["cut_tokens"] if options.truncate else []
        names += ["tokens", "log_probabilities"] if options.token_scores else []
    return names + ([f"base_{options.score}", f"{options.score}_change"] if with_base else [])


def _plan_texts(loaded: Loaded, texts: Sequence[str], options: ScoreOptions, door: Door | None) -> Work:
    tokens, asks = [], []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        for text in encode_texts(loaded.tokenizer, part, loaded.model, truncate=options.truncate, first=start + 1):
            tokens.append(len(text.scored) * len(text.ids))
            asks.append(len(text.scored))
    return Work(
        tokens, lambda rows: sum(asks[row] for row in rows), partial(_score_texts, loaded, texts, options, door)
    )


def _score_texts(
    loaded: Loaded, texts: Sequence[str], options: ScoreOptions, door: Door | None, rows: range, advance: Advance
) -> list[dict[str, Any]]:
    found = pseudo_log_likelihoods(
        loaded.model,
        loaded.tokenizer,
        [texts[row] for row in rows],
        variant=cast(Variant, options.variant),
        truncate=options.truncate,
        max_tokens_per_batch=options.max_tokens_per_batch,
        door=door,
        advance=advance,
    )
    records = []
    for one in found:
        record: dict[str, Any] = {
            "pseudo_log_likelihood": one.log_likelihood,
            "pseudo_perplexity": one.pseudo_perplexity,
            "scored_tokens": one.tokens,
            "unknown_tokens": one.unknown,
        }
        if options.truncate:
            record["cut_tokens"] = one.cut
        if options.token_scores:
            record["tokens"] = loaded.tokenizer.convert_ids_to_tokens(one.token_ids.tolist())
            record["log_probabilities"] = one.log_probabilities.tolist()
        records.append(record)
    return records


def _plan_mutations(loaded: Loaded, texts: Sequence[str], options: ScoreOptions, door: Door | None) -> Work:
    sets, row_length = _residue_sets(loaded, texts, options)
    if options.method == "wild_type_marginal":
        sets = [places and (0,) for places in sets]  # one row for all
    seen: set[Any] = {()}
    tokens = []
    for places in sets:
        tokens.append(0 if places in seen else row_length)
        seen.add(places)

    def asks(rows: range) -> int:
        return len({sets[row] for row in rows} - {()})

    return Work(tokens, asks, partial(_score_mutations, loaded, texts, options, door))


def _residue_sets(loaded: Loaded, texts: Sequence[str], options: ScoreOptions) -> tuple[list[tuple[int, ...]], int]:
    """Check all mutations; give the numbers of the residues that each changes, and the tokens of the sequence."""
    parsed = []
    for number, text in enumerate(texts, 1):
        try:
            parsed.append(parse_mutation(text))
        except DataError as error:
            raise DataError(f"Row {number}: {error}") from None
    check_mutations(parsed, options.sequence, offset=options.offset, names=[f"row {n + 1}" for n in range(len(texts))])
    letters = {letter for mutation in parsed for one in mutation for letter in (one.wild_type, one.mutant)}
    protein = encode_protein(loaded.tokenizer, options.sequence, loaded.model, letters="".join(sorted(letters)))
    return [tuple(sorted(one.number for one in mutation)) for mutation in parsed], len(protein.ids)


def _score_mutations(
    loaded: Loaded, texts: Sequence[str], options: ScoreOptions, door: Door | None, rows: range, advance: Advance
) -> list[dict[str, Any]]:
    scores = mutation_scores(
        loaded.model,
        loaded.tokenizer,
        options.sequence,
        [texts[row] for row in rows],
        method=cast(Marginal, options.method),
        offset=options.offset,
        max_tokens_per_batch=options.max_tokens_per_batch,
        door=door,
        advance=advance,
    )
    return [{options.method: value} for value in scores]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()
