"""How many tokens a model's row holds."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# run_mlm's limit for models that hold more: longer rows cost memory that a consumer GPU does not have.
DEFAULT_MAX_SEQ_LENGTH = 1024
# What PEFT adds to the name of a table that an adapter changes.
WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)$")


def position_limit(model: PreTrainedModel) -> int | None:
    """Count the positions that a model holds, special tokens included.

    RoBERTa-like models number positions from `padding_idx + 1`, so that a table of 514 rows holds 512 tokens; others
    have a table with spare rows. Models with rotary or relative positions hold what their config says.

    Args:
        model: The masked LM.

    Returns:
        The largest row length, or None where neither a table nor the config sets one.
    """
    limits = []
    for table in _position_tables(model):
        padding_idx = table.padding_idx
        limits.append(table.num_embeddings - (0 if padding_idx is None else padding_idx + 1))
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    return min(limits, default=None)


def padding_position(model: PreTrainedModel) -> int | None:
    """Find the position of padding in models that count the other tokens from the next one on.

    Args:
        model: The masked LM.

    Returns:
        The position, which is the id of the padding token too; None where positions are counted from 0.
    """
    table = next(_position_tables(model), None)
    return None if table is None else table.padding_idx


def _position_tables(model: PreTrainedModel) -> Iterator[nn.Embedding]:
    for name, module in model.named_modules():
        # The whole last part of the name: LayoutLM has x_position_embeddings for places on a page.
        if isinstance(module, nn.Embedding) and WRAPPED.sub("", name).rpartition(".")[2] == "position_embeddings":
            yield module


def resolve_max_seq_length(
    requested: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str | None]:
    """Choose the row length.

    Args:
        requested: What the user asks for, in tokens, or None.
        model: The masked LM; its positions are the limit.
        tokenizer: Its `model_max_length` is the limit where the model sets none.

    Returns:
        The row length in tokens (special tokens included), and a sentence for the user if it is not what was asked.
    """
    held = position_limit(model)
    stated = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    if requested is not None:
        if held is not None and requested > held:
            return held, f"max_seq_length {requested} is more than the model's {held} positions: {held} is used."
        return requested, None
    limit = min(x for x in (held, stated, DEFAULT_MAX_SEQ_LENGTH) if x is not None)
    notice = None
    if limit == DEFAULT_MAX_SEQ_LENGTH and (held is None or held > limit):
        notice = f"max_seq_length is {limit}; the model would hold {held or 'more'}: set it to use longer rows."
    return limit, notice
