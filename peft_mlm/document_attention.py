"""Documents side by side in a row, each read as if it stood alone.

Attention stays inside a document by a mask with one block for each (Krell et al. 2021,
https://arxiv.org/abs/2107.02027), and the positions of each start anew. The mask holds numbers that are added to the
scores: a mask of truth values is added as 0 and 1 by some eager attention code. Flash attention is told
where documents start, and makes no mask. Padding sees padding alone, so that no
row of the mask is empty.

Where the mask has to go differs by model type (`ModelType.documents`); what the type's row promises is proved on the
model itself before it is used.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.collator import DOCUMENT_IDS
from peft_mlm.model_types import MODEL_TYPES, ModelType
from peft_mlm.positions import padding_position
from peft_mlm.probing import evaluating

# Attention code that takes a mask of numbers, and code that takes the places where documents start instead. Flex
# attention would take a mask of its own; it has no backward pass on a CPU, and is not offered untried.
ATTENTION, FLASH = ("eager", "sdpa"), "flash_attention_2"
# Tokens of the documents of the probe; a longer one goes beyond the model's window of attention, where it has one.
_PROBE_LENGTHS = (12, 5, 9)

Tensors = Mapping[str, torch.Tensor]


def why_not_apart(model: PreTrainedModel, longest: int) -> str | None:
    """Find out whether documents side by side get the predictions that each gets alone.

    Args:
        model: A masked LM, without adapter.
        longest: Tokens of the longest row: attention windows that are shorter are tried too.

    Returns:
        None if they do, exact to rounding; else the reason, to follow "because".
    """
    kind = model.config.model_type
    if MODEL_TYPES.get(kind, ModelType()).documents == "none":
        return f"transformers has no way to keep them apart in {kind} models"
    attention = _attention(model)
    if attention not in (*ATTENTION, FLASH):
        return f"attn_implementation {attention} does not take documents here; {', '.join(ATTENTION)} and {FLASH} do"
    if attention == FLASH and torch.cuda.is_available():
        model.to("cuda")  # it runs nowhere else, and in 16 bits alone
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, attention == FLASH):
        try:
            alone, together = _probe(model, longest)
        except Exception as error:  # whatever the code of a model raises on a mask it was not made for
            return f"this model takes no mask of documents ({type(error).__name__})"
    allowed = 8 * torch.finfo(alone.dtype).eps if alone.dtype.itemsize == 2 else 1e-5
    difference = float((together - alone).abs().max())
    if not difference <= allowed * max(1.0, float(alone.abs().max())):
        return f"this model then gives other predictions than for each alone (logits differ by {difference:.1g})"
    return None


def _probe(model: PreTrainedModel, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the logits of some documents, each alone and side by side: (1, T, V) both."""
    documents = _probe_documents(model, longest)
    alone = [model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits for ids in documents]
    row = torch.cat(documents)[None]
    numbers = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(documents, start=1)])[None]
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row), DOCUMENT_IDS: numbers}
    with documents_apart(model, batch) as inputs:
        return torch.cat(alone, dim=1), model(**inputs).logits


@contextlib.contextmanager
def documents_apart(model: PreTrainedModel, batch: Tensors) -> Iterator[dict[str, Any]]:
    """Make the inputs with which a model reads each document of a batch alone.

    Args:
        model: A masked LM without wrappers, of which `why_not_apart` gave None if the batch numbers documents.
        batch: `input_ids`, `attention_mask`, and `document_ids` where rows hold documents side by side, (B, T) each.

    Yields:
        What to call the model with, while the context is open; the batch itself where it numbers no documents.
    """
    if DOCUMENT_IDS not in batch:
        yield dict(batch)
        return
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != DOCUMENT_IDS}
    documents = batch[DOCUMENT_IDS]
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions_in_documents(documents, inputs["input_ids"], padding_position(model))
    same = documents[:, None, :, None] == documents[:, None, None, :]
    if _attention(model) == FLASH:
        inputs |= {"attention_mask": None, **_starts_of_documents(documents)}
        with _ratio_of_documents(model, same, inputs):
            yield inputs
        return
    how = MODEL_TYPES[model.config.model_type].documents
    if how == "mask of the encoder":
        with _encoder_sees(model, same), _ratio_of_documents(model, same, inputs):
            yield inputs
        return
    if how == "masks by kind of layer":
        places = torch.arange(documents.shape[1], device=documents.device)
        near = (places[:, None] - places[None, :]).abs() <= model.config.get_text_config().sliding_window
        inputs["attention_mask"] = {
            "full_attention": _additive(model, same),
            "sliding_attention": _additive(model, same & near),
        }
    else:
        inputs["attention_mask"] = _additive(model, same)
    yield inputs


def positions_in_documents(
    documents: torch.Tensor, input_ids: torch.Tensor, padding_position: int | None
) -> torch.Tensor:
    """Number the tokens of each document as the model numbers those of a row.

    Example:
        >>> documents = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
        >>> ids = torch.tensor([[0, 7, 2, 0, 2, 1, 1]])
        >>> positions_in_documents(documents, ids, None).tolist()
        [[0, 1, 2, 0, 1, 0, 1]]
        >>> positions_in_documents(documents, ids, 1).tolist()
        [[2, 3, 4, 2, 3, 1, 1]]

    Args:
        documents: (B, T), the number of each token's document.
        input_ids: (B, T).
        padding_position: Position, and id, of the padding token in models that count the other tokens from the next
            one on (RoBERTa); None in those that count all tokens from 0.

    Returns:
        (B, T), int64.
    """
    starts = _starts(documents)
    counted = torch.ones_like(starts) if padding_position is None else input_ids != padding_position
    numbers = counted.cumsum(dim=1)
    before = torch.where(starts, numbers - counted.long(), 0).cummax(dim=1).values
    if padding_position is None:
        return numbers - before - 1
    return (numbers - before) * counted + padding_position


def _attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _starts(documents: torch.Tensor) -> torch.Tensor:
    """Tell where a document, a row or its padding starts: (B, T), bool."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


def _starts_of_documents(documents: torch.Tensor) -> dict[str, Any]:
    """Give what flash attention reads: where documents start in all rows end to end, and the longest one's tokens."""
    starts = _starts(documents).flatten().nonzero().flatten()
    edges = torch.cat([starts, starts.new_tensor([documents.numel()])]).int()
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def _additive(model: PreTrainedModel, seen: torch.Tensor) -> torch.Tensor:
    """Turn what is seen into numbers for the scores, in the type that the model computes in."""
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(seen.device.type):
        dtype = torch.get_autocast_dtype(seen.device.type)
    numbers = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return numbers.masked_fill_(~seen, torch.finfo(dtype).min)


@contextlib.contextmanager
def _encoder_sees(model: PreTrainedModel, same: torch.Tensor) -> Iterator[None]:
    """Hand the mask to the encoder alone: the embeddings before it need one number per token."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = args[1] if len(args) > 1 else kwargs["attention_mask"]
        # What is (B, T) yet is made of zeros and ones; what is (B, 1, T, T) or left out is added to the scores.
        mask = same.to(given.dtype) if given is not None and given.dim() == 2 else _additive(model, same)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    handle = model.base_model.encoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _ratio_of_documents(model: PreTrainedModel, same: torch.Tensor, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let ESM scale each document's embeddings by the share of mask tokens in the document, not in the row."""
    if not getattr(model.config, "token_dropout", False):
        yield
        return
    masked = inputs["input_ids"] == model.config.mask_token_id
    real = torch.ones_like(masked) if inputs["attention_mask"] is None else inputs["attention_mask"]
    of_row = masked.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    of_document = (same & masked[:, None, None, :]).sum(-1).squeeze(1) / same.sum(-1).squeeze(1)
    factor = ((1 - of_row) / (1 - of_document)).unsqueeze(-1)

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * factor.to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _probe_documents(model: PreTrainedModel, longest: int) -> list[torch.Tensor]:
    """Make documents of unequal lengths, one beyond the attention window, with a mask token in one."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) if hasattr(text, "layer_types") else None
    beyond = min(longest, 2 * window + 8) if isinstance(window, int) else 0
    documents, start = [], 0
    for length in (*_PROBE_LENGTHS, max(beyond, 4)):
        length = min(length, longest)
        documents.append(torch.arange(start, start + length, device=model.device).remainder(vocabulary))
        start += length
    mask_token = getattr(model.config, "mask_token_id", None)
    if isinstance(mask_token, int) and mask_token < vocabulary:
        documents[0][1] = mask_token
    return documents
