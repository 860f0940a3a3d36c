"""Vocabulary of model and tokenizer: how many rows are needed, and rows added, started and named for new tokens.

What is per token in a masked LM: the rows of the embeddings, the rows of the decoder (the same matrix where it is
tied), and a bias per token. Rows of new tokens are trained and shipped. A bias, and the columns that MobileBERT has
beside its decoder, can't be shipped as rows: they stay where they start, and that is where transformers'
`resize_token_embeddings` starts them, so that plain PEFT makes the same base. A bias starts at zero where the decoder
is tied, and at the mean of the old ones where it is not (transformers 5.24; of a tied decoder it grows the matrix with
the embeddings, and pads the bias later).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.arguments import NewTokenInit
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ModelError
from peft_mlm.tokenizer import pieces_of, read_reading

# Further tables of the encoder with a row per token, by model type.
MORE_TABLES = {"neomme": ("value_embeddings",)}
# Matrices with a column per token, by model type.
COLUMNS = {"mobilebert": ("cls.predictions.dense",)}
# Under these names some modules keep the number of tokens for themselves.
SIZE_NAMES = ("vocab_size", "n_words")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the number of embedding rows that a tokenizer needs.

    `len(tokenizer)` counts the tokens; where their ids have gaps, the highest id asks for more rows.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The highest id plus one.
    """
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Give the number of rows of a model's embeddings; there may be more than its tokenizer has tokens.

    Args:
        model: The masked LM.

    Returns:
        Rows.
    """
    embeddings: Any = model.get_input_embeddings()
    # Perceiver calls its latents, which have nothing to do with tokens, its input embeddings.
    is_matrix = isinstance(embeddings, nn.Module)
    return len(embeddings.weight) if is_matrix else int(model.config.vocab_size)


def row_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Find the matrices that hold a row per token, a tied one once.

    Args:
        model: The masked LM.

    Returns:
        Modules by full name: the embeddings first, the decoder where it is a matrix of its own.
    """
    embeddings, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    more = [model.base_model.get_submodule(name) for name in MORE_TABLES.get(model.config.model_type, ())]
    tables = [embeddings, *more]
    if decoder is not None and not _is_tied(model):
        tables.append(decoder)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: table for table in tables}


def fit_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None,
    may_grow: bool,
    old_tokenizer: PreTrainedTokenizerBase | None = None,
    start: NewTokenInit = "mean",
) -> tuple[int, ...]:
    """Add the embedding rows that a tokenizer needs and the model lacks, and start the rows of new tokens.

    A row is new where the matrix did not have it, and where the base's own tokenizer has no token for it: many
    matrices have spare rows at their end, which were never trained as inputs. Rows start the same whenever the base is
    grown again. None is ever removed.

    Args:
        model: The masked LM; it is changed in place.
        tokenizer: The tokenizer whose ids it takes.
        name: Hub name or folder of the model, for the message.
        may_grow: Whether rows may be added.
        old_tokenizer: The base's own tokenizer; None where `tokenizer` is that, or where there is none.
        start: How new rows start: `mean`, the mean of the old tokens' rows; `pieces`, the mean of the rows of the
            pieces that the old tokenizer splits a token into (the mean of all where it knows none of them).

    Returns:
        The ids of the new rows, in rising order.

    Raises:
        ModelError: The tokenizer is longer and `may_grow` is False, or the model type cannot grow.
    """
    rows, needed = vocabulary_rows(model), vocabulary_size(tokenizer)
    if needed > rows and not may_grow:
        raise ModelError(
            f"The tokenizer has ids up to {needed - 1}, the model {name} has {rows} rows in its vocabulary, and "
            "nothing that is loaded here holds the others. Use the model's own tokenizer, or train with the longer one "
            "first."
        )
    old_ids = range(rows) if old_tokenizer is None else set(old_tokenizer.get_vocab().values())
    new = sorted({*tokenizer.get_vocab().values(), *range(rows, needed)} - set(old_ids))
    if not new:
        return ()
    if type(model.get_input_embeddings()) is not nn.Embedding:
        raise ModelError(
            f"New tokens cannot be added to a {model.config.model_type} model: its embeddings are no plain matrix of "
            "rows that could be grown. Use its own tokenizer, without add_tokens."
        )
    if needed > rows:
        _grow(model, rows, needed)
    if _is_tied(model):
        # PEFT ties the decoder's rows to those of the embeddings only where the config as written says so; that of
        # nomic_bert leaves it out.
        model.config.tie_word_embeddings = True
    last_old = min(rows, max(old_ids, default=-1) + 1)
    sources = {} if start == "mean" or old_tokenizer is None else _pieces(tokenizer, old_tokenizer, new, last_old)
    _start_rows(model, new, last_old, sources)
    return tuple(new)


def token_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Say which rows to train for new tokens, as PEFT's `trainable_token_indices` wants it.

    Args:
        model: The masked LM.
        ids: Ids of the new tokens.

    Returns:
        Ids by the full name of each matrix: embeddings and, where it is not tied to them, the decoder. None for no id.
    """
    return {name: list(ids) for name in row_tables(model)} if ids else None


def growth_code(model: PreTrainedModel, added: int) -> list[str]:
    """Write the lines of plain transformers that grow a fresh `base` as `fit_vocabulary` did, for a model card.

    Args:
        model: The grown masked LM, or the model with its adapter around it.
        added: How many rows it got.

    Returns:
        Lines of Python; none where no row was added. They leave the shipped rows to the adapter.
    """
    if not added:
        return []
    rows = vocabulary_rows(model)
    lines = [f"base.resize_token_embeddings({rows})"]
    for name in _lone_biases(model, rows):
        grown = f"torch.nn.functional.pad(base.{name}.bias.detach(), (0, {added}))"
        lines.append(f"base.{name}.bias = torch.nn.Parameter({grown})")
    for name in COLUMNS.get(model.config.model_type, ()):
        lines += [
            f"columns = base.{name}.weight.data",
            f"columns[:, -{added}:] = columns[:, :-{added}].mean(dim=1, keepdim=True)",
        ]
    return lines


def _is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the decoder's matrix is that of the embeddings; what the config says is not always so (luke)."""
    decoder = model.get_output_embeddings()
    return decoder is not None and decoder.weight is model.get_input_embeddings().weight


def _grow(model: PreTrainedModel, rows: int, needed: int) -> None:
    """Grow all that is per token, where transformers does not too; the global random numbers are left alone."""
    lone = _lone_biases(model, rows)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(needed)  # MobileBERT's takes no other argument
    for name in lone:
        module = model.get_submodule(name)
        bias: Any = module.bias
        if len(bias) == needed:  # where an untied decoder and its head have a bias each, transformers sets both
            continue
        grown = nn.functional.pad(bias.detach(), (0, needed - rows))
        module.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)
    decoder: Any = model.get_output_embeddings()
    columns: list[Any] = [model.get_submodule(name).weight for name in COLUMNS.get(model.config.model_type, ())]
    with torch.no_grad():
        if decoder is not None and decoder.bias is not None:
            decoder.bias[rows:] = 0 if _is_tied(model) else decoder.bias[:rows].mean()
        for matrix in columns:
            matrix[:, rows:] = matrix[:, :rows].mean(dim=1, keepdim=True)
    for module in (*model.modules(), model.config):
        for name in SIZE_NAMES:
            if vars(module).get(name) == rows:
                setattr(module, name, needed)


def _lone_biases(model: PreTrainedModel, rows: int) -> list[str]:
    """Name the modules with a bias per token beside the decoder (ESM): transformers grows only the decoder's own."""
    decoder = model.get_output_embeddings()
    own = None if decoder is None else getattr(decoder, "bias", None)
    return [
        name
        for name, module in model.named_modules()
        if (bias := module._parameters.get("bias")) is not None
        and bias.shape == (rows,)
        and bias is not own
        and "weight" not in module._parameters
    ]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, old_tokenizer: PreTrainedTokenizerBase, new: Sequence[int], last_old: int
) -> dict[int, list[int]]:
    """Give, for each new id, the rows of the pieces that the token was."""
    reading = read_reading(old_tokenizer)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    found = {i: [p for p in pieces_of(old_tokenizer, tokens[i], reading) if p < last_old] for i in new if i in tokens}
    return {i: pieces for i, pieces in found.items() if pieces}


@torch.no_grad()
def _start_rows(model: PreTrainedModel, new: Sequence[int], last_old: int, sources: dict[int, list[int]]) -> None:
    """Start new rows of every table at the mean of all old rows, or of those named as their sources."""
    for table in row_tables(model).values():
        weight: Any = table.weight
        # Summed in float64: the same to the last bit of the result, whatever the number of threads.
        mean = weight[:last_old].sum(dim=0, dtype=torch.float64) / last_old
        weight[list(new)] = mean.to(weight.dtype)
        for i, pieces in sources.items():
            weight[i] = weight[pieces].mean(dim=0, dtype=torch.float64).to(weight.dtype)
