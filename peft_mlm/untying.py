"""Ties between embeddings and decoder: made true to the checkpoint, or cut where the user asks for it.

A tied model uses one matrix as embedding and as decoder. transformers keeps the tie by name: whatever calls
`tie_weights` later, such as a vocabulary that grows, ties again what the config calls tied. So the config must always
tell the truth, and what shares memory must be what the config calls tied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.errors import ModelError
from peft_mlm.heads import tied_parameters
from peft_mlm.probing import evaluating


def decoder_reads_embeddings(model: PreTrainedModel) -> bool:
    """Tell whether the logits are computed from the embedding matrix, by whatever way: an alias, or a call with it.

    Args:
        model: The masked LM; it is unchanged afterwards.

    Returns:
        True if the row of a token that is not in the input shows in the logits.
    """
    weight = model.get_input_embeddings().weight
    ids = torch.zeros((1, 4), dtype=torch.long, device=weight.device)
    row = weight[-1].detach().clone()
    with evaluating(model), torch.no_grad():
        try:
            before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            weight[-1] += 1
            after = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            weight[-1] = row
    return not torch.equal(before, after)


def keep_ties_of_checkpoint(model: PreTrainedModel) -> str | None:
    """Make config and model agree, where a checkpoint holds two ends that its config calls tied.

    transformers then loads both ends, and leaves the config as it is: the next growth of the vocabulary would tie them
    again, and lose the decoder.

    Args:
        model: The masked LM as loaded; it is changed in place, not what it computes.

    Returns:
        A sentence for the user, or None where config and checkpoint agree.
    """
    apart = {
        target: source
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if model.get_parameter(target) is not model.get_parameter(source)
    }
    if not apart:
        return None
    if any(model.get_parameter(target).dim() > 1 for target in apart):
        keep_apart(model)
        return (
            f"The checkpoint holds {_names(apart)} apart from {_names(apart.values())}, although its config calls them "
            "tied: they are kept apart, and the config now says so (tie_word_embeddings=False)."
        )
    for target, source in apart.items():
        # The decoder adds its own bias; the other name stands for it in the file only.
        owner, _, name = source.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(target))
        model.all_tied_weights_keys[target] = source
    return f"The checkpoint holds other values in {_names(apart)} than in {_names(apart.values())}: the first are used."


def untie_embeddings(model: PreTrainedModel) -> bool:
    """Give the decoder a matrix and a bias of its own, equal to those that it shared.

    Afterwards both ends can be trained, merged and saved each for itself; the config says `tie_word_embeddings=False`,
    so that plain transformers loads both.

    Args:
        model: The masked LM; it is changed in place, not what it computes.

    Returns:
        Whether the decoder shared anything.

    Raises:
        ModelError: The model has no decoder that could hold a matrix: it calls the embedding matrix itself.
    """
    decoder = model.get_output_embeddings()
    tied = tied_parameters(model)
    if decoder is not None and any(id(parameter) in tied for parameter in decoder.parameters(recurse=False)):
        keep_apart(model)
        return True
    if decoder_reads_embeddings(model):
        raise ModelError(
            f"This {model.config.model_type} model computes its logits from the embedding matrix itself and has no "
            "decoder that could be given a matrix of its own. Leave --untie_embeddings out."
        )
    return False


def keep_apart(model: PreTrainedModel) -> None:
    """Give each end a copy of what both share, and say so in the config.

    Args:
        model: The masked LM; it is changed in place, not what it computes.
    """
    # Without the tie, transformers takes every pair of its list for two weights.
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is model.get_parameter(source):
            owner, _, name = target.rpartition(".")
            _own(model.get_submodule(owner), name)
    decoder = model.get_output_embeddings()
    if decoder is not None:  # growing a vocabulary ties biases that the list does not hold any more
        tied = tied_parameters(model)
        for name in [name for name, parameter in decoder.named_parameters(recurse=False) if id(parameter) in tied]:
            _own(decoder, name)
    _tell_untied(model)


def _own(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))


def _tell_untied(model: PreTrainedModel) -> None:
    """Write into every config of the model, and into what transformers derives from it, that nothing is tied."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        part.config.tie_word_embeddings = False
    for part in parts:
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)


def _names(names: Any) -> str:
    return ", ".join(names)
