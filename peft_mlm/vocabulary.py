"""Vocabulary of model and tokenizer: how many rows are needed, and rows added for new tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ModelError


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the number of embedding rows that a tokenizer needs.

    `len(tokenizer)` counts the tokens; where their ids have gaps, the highest id asks for more rows.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The highest id plus one.
    """
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None, may_grow: bool
) -> tuple[int, ...]:
    """Add embedding rows for a tokenizer that is longer than the model's vocabulary; never remove any.

    Args:
        model: The masked LM; it is changed in place.
        tokenizer: The tokenizer whose ids it takes.
        name: Hub name or folder of the model, for the message.
        may_grow: Whether rows may be added.

    Returns:
        The ids of the new rows.

    Raises:
        ModelError: The tokenizer is longer and `may_grow` is False.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    needed = vocabulary_size(tokenizer)
    if needed <= rows:
        return ()
    if not may_grow:
        raise ModelError(
            f"The tokenizer has ids up to {needed - 1}, the model {name} has {rows} rows in its vocabulary, and "
            "nothing that is loaded here holds the others. Use the model's own tokenizer, or train with the longer one "
            "first."
        )
    with quiet_transformers():
        model.resize_token_embeddings(needed, mean_resizing=False)
    _start_new_rows(model, rows, needed)
    return tuple(range(rows, needed))


def _start_new_rows(model: PreTrainedModel, first: int, vocabulary: int) -> None:
    """Start new rows at the mean of the old ones, new biases at zero: the same whenever the base is grown again."""
    for module in model.modules():
        # A bias that stands beside the decoder, as ESM has it; transformers grows only the decoder's own.
        bias = module._parameters.get("bias")
        lone = bias is not None and not hasattr(module, "weight") and bias.shape == (first,)
        if lone:
            grown = torch.cat([bias.detach(), bias.new_zeros(vocabulary - first)])
            module.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is None:
                continue
            layer.weight[first:] = layer.weight[:first].mean(dim=0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[first:] = 0
