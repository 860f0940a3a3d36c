"""Texts -> the model's rows, split by split, with everything counted that was cut, dropped or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.collator import MaskingCollator, from_tokenizer
from peft_mlm.data import TextData
from peft_mlm.document_attention import why_not_apart
from peft_mlm.document_packing import DOCUMENT_NUMBERS
from peft_mlm.packing import RowFacts, make_rows
from peft_mlm.positions import resolve_max_seq_length
from peft_mlm.tokenization import describe_tokens, special_token_frame, text_separator, tokenize

# Above this share of unknown tokens the tokenizer does not know the language of the text.
MUCH_UNKNOWN = 0.05


@dataclass(frozen=True)
class Corpus:
    """Rows to train and evaluate on.

    Attributes:
        rows: By split ("train", "validation"): a data set with `input_ids`; validation rows that were cut from texts
            tell from which (`document_numbers`).
        facts: By split: source, texts, tokens, rows, dropped, truncated, unknown share, fingerprint; fill rate.
        max_seq_length: Tokens per row, special tokens included.
        notices: Sentences that the user should read.
    """

    rows: Mapping[str, Dataset]
    facts: dict[str, dict[str, Any]]
    max_seq_length: int
    notices: tuple[str, ...]


def build_corpus(
    text: TextData, arguments: DataTrainingArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """Tokenise the texts and make rows of them.

    Args:
        text: Texts by split.
        arguments: How to make rows, and how many to use.
        model: Its positions limit the row length.
        tokenizer: Makes the tokens.

    Returns:
        The rows, with facts and notices.

    Raises:
        DataError: The texts give no row.
    """
    max_seq_length, notice = resolve_max_seq_length(arguments.max_seq_length, model, tokenizer)
    notices = [] if notice is None else [notice]
    mixed = why_not_apart(model, max_seq_length) if arguments.rows == "packed" else None
    if mixed is not None:
        notices.append(
            f"rows packed: documents do not stand side by side here, because {mixed}. Each has a row of its own, and "
            "rows of like length are batched together."
        )
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    rows, facts = {}, {}
    for split, texts in text.splits.items():
        tokens = tokenize(
            texts,
            tokenizer,
            num_proc=arguments.preprocessing_num_workers,
            overwrite_cache=arguments.overwrite_cache,
        )
        rows[split], facts[split] = _make_split(
            tokens, arguments, tokenizer, max_seq_length, limits[split], side_by_side=mixed is None
        )
        if split == "train" and DOCUMENT_NUMBERS in rows[split].column_names:  # evaluations alone ask for them
            rows[split] = rows[split].remove_columns(DOCUMENT_NUMBERS)
        facts[split] = {**text.facts[split], **facts[split]}
        notices += _remarks(split, facts[split])
    return Corpus(rows, facts, max_seq_length, tuple(notices))


def build_collators(
    corpus: Corpus,
    arguments: DataTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    half_precision: bool,
) -> tuple[MaskingCollator, MaskingCollator]:
    """Make what turns rows into masked batches.

    Args:
        corpus: The rows.
        arguments: How to mask and to pad.
        tokenizer: Its mask and padding tokens.
        seed: Of the training masks.
        half_precision: Whether the model computes in 16 bits, where lengths that 8 divides are faster.

    Returns:
        The collators of training and of evaluation.
    """
    options: dict[str, Any] = {
        "mlm_probability": arguments.mlm_probability,
        "mask_replace_prob": arguments.mask_replace_prob,
        "random_replace_prob": arguments.random_replace_prob,
        "pad_to": corpus.max_seq_length if arguments.pad_to_max_length else None,
        "pad_to_multiple_of": 8 if half_precision and not arguments.pad_to_max_length else None,
    }
    return (
        from_tokenizer(tokenizer, seed=seed, fixed=False, **options),
        from_tokenizer(tokenizer, seed=arguments.eval_mask_seed, fixed=True, **options),
    )


def _make_split(
    tokens: Dataset,
    arguments: DataTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    limit: int | None,
    *,
    side_by_side: bool,
) -> tuple[Dataset, dict[str, Any]]:
    prefix, suffix = special_token_frame(tokenizer)
    token_facts = asdict(describe_tokens(tokens, tokenizer))
    rows, row_facts = make_rows(
        tokens,
        rows=arguments.rows,
        max_seq_length=max_seq_length,
        prefix=prefix,
        suffix=suffix,
        separator_id=text_separator(tokenizer),
        num_proc=arguments.preprocessing_num_workers,
        side_by_side=side_by_side,
    )
    facts = {
        "max_seq_length": max_seq_length,
        "text_tokens": token_facts["tokens"],
        **{name: token_facts[name] for name in ("unknown_tokens", "unknown_share", "longest_text", "text_lengths")},
        **{name: value for name, value in asdict(row_facts).items() if name != "texts"},
        "fill_rate": _fill_rate(row_facts, max_seq_length, len(prefix) + len(suffix))
        if arguments.rows == "packed" and side_by_side
        else None,
        "rows_used": len(rows) if limit is None else min(limit, len(rows)),
    }
    return rows.select(range(facts["rows_used"])), facts


def _fill_rate(facts: RowFacts, max_seq_length: int, special: int) -> float:
    """Share of the rows' places that documents fill, their special tokens included."""
    return round((facts.tokens + special * facts.documents) / (max_seq_length * facts.rows), 4)


def _remarks(split: str, facts: Mapping[str, Any]) -> list[str]:
    """Say what was lost, and what looks like a mistake."""
    said = []
    if facts["truncated_texts"]:
        said.append(
            f"{split}: {facts['truncated_texts']:,} texts are longer than max_seq_length {facts['max_seq_length']} and "
            f"were cut; {facts['truncated_tokens']:,} tokens are lost. --rows chunked and packed lose none."
        )
    if facts["cut_texts"]:
        said.append(
            f"{split}: {facts['cut_texts']:,} texts are longer than max_seq_length {facts['max_seq_length']} and were "
            "cut into pieces; nothing is lost."
        )
    if facts["dropped_tokens"]:
        said.append(f"{split}: {facts['dropped_tokens']:,} tokens at the ends of batches are lost, as in run_mlm.")
    if facts["unknown_share"] > MUCH_UNKNOWN:
        said.append(
            f"{split}: {facts['unknown_share']:.1%} of the tokens are unknown to the tokenizer. Does it fit the text?"
        )
    if facts.get("also_in_train"):
        said.append(f"{split}: {facts['also_in_train']:,} texts also stand in the training text; its figures flatter.")
    return said
