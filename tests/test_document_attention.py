"""Documents side by side: each gets the logits, loss and gradients that it gets alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForMaskedLM, modeling_flash_attention_utils

from peft_mlm.collator import DOCUMENT_IDS, IGNORE_INDEX, from_tokenizer
from peft_mlm.document_attention import documents_apart, positions_in_documents, why_not_apart
from peft_mlm.document_packing import DOCUMENT_LENGTHS
from peft_mlm.gathered_head import find_door, sum_over_masked
from peft_mlm.metrics import cross_entropy_sum
from peft_mlm.model_types import MODEL_TYPES
from peft_mlm.positions import position_limit
from tests.tiny import letter_tokenizer, perturb, tiny_config, tiny_model

TAKE_DOCUMENTS = sorted(name for name, row in MODEL_TYPES.items() if row.documents != "none")
AFTER_PADDING = [name for name in TAKE_DOCUMENTS if MODEL_TYPES[name].positions == "table after padding"]
OTHERS = sorted(name for name, row in MODEL_TYPES.items() if row.documents == "none" and row.refusal is None)
# Windows that the documents here reach beyond, where the type can be told of them.
WINDOWS = {"modernbert": {"local_attention": 8}, "modernvbert": {"local_attention": 8}}
# Computed in float32 inside a model of float64: softmax of eager attention, tables of sines.
IN_FLOAT32 = ("eurobert", "layoutlm", "modernbert", "modernvbert", "roformer", "ultrabert", "ultravbert")
LENGTHS = [[5, 30, 7, 4], [9, 3]]
CASES = [(name, code) for name in TAKE_DOCUMENTS for code in ("eager", "sdpa") if code in MODEL_TYPES[name].attention]


def model_of(model_type: str, attention: str = "eager") -> Any:
    model = tiny_model(model_type, **WINDOWS.get(model_type, {}))
    model.set_attn_implementation(attention)
    return model


def documents() -> list[list[np.ndarray[Any, Any]]]:
    chance = np.random.default_rng(0)
    return [[np.array([0, *chance.integers(5, 25, size=n - 2), 2]) for n in row] for row in LENGTHS]


def collated(rows: list[list[np.ndarray[Any, Any]]], **options: Any) -> dict[str, torch.Tensor]:
    collator = from_tokenizer(letter_tokenizer(), mlm_probability=0.4, fixed=True, **options)
    return collator([{"input_ids": np.concatenate(row), DOCUMENT_LENGTHS: [len(one) for one in row]} for row in rows])


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


def loss_alone(model: Any) -> torch.Tensor:
    """Cross-entropy of each document in a row of its own, by plain transformers."""
    collator = from_tokenizer(letter_tokenizer(), mlm_probability=0.4, fixed=True)
    total = torch.zeros((), dtype=torch.float64)
    for one in [document for row in documents() for document in row]:
        batch = collator([{"input_ids": one}])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total = total + functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum")
    return total


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_loss_and_gradients_are_those_of_each_document_alone(model_type: str, attention: str) -> None:
    model = model_of(model_type, attention).double()
    check_against_documents_alone(model, 1e-5 if model_type in IN_FLOAT32 and attention == "eager" else 1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_esm_scales_by_the_mask_tokens_of_each_document(positions: str, attention: str) -> None:
    """ESM-2 and ESM-1b scale embeddings by the share of mask tokens; rows hold documents with other shares."""
    model: Any = tiny_model(
        "esm", position_embedding_type=positions, token_dropout=True, emb_layer_norm_before=positions == "absolute"
    )
    model.set_attn_implementation(attention)
    check_against_documents_alone(model.double(), 1e-6)  # the share is computed in float32
    assert why_not_apart(model.float(), longest=62) is None


def check_against_documents_alone(model: Any, allowed: float) -> None:
    expected = loss_alone(model)
    wanted = gradients(model, expected)
    scale = max(1.0, *(float(g.abs().max()) for g in wanted))
    batch = collated(documents())
    assert batch[DOCUMENT_IDS].shape == (2, 46)
    labels = batch.pop("labels")
    assert int((labels != IGNORE_INDEX).sum()) > 10
    for door, logits_bytes in ((None, 2**28), (find_door(model), 2**28), (find_door(model), 4 * 25 * 3)):
        total = sum_over_masked(model, batch, labels, cross_entropy_sum, door=door, logits_bytes=logits_bytes)
        assert total.item() == pytest.approx(expected.item(), abs=allowed * max(1.0, expected.item()))
        given = gradients(model, total)
        assert len(given) == len(wanted)
        assert max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)) < allowed * scale


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_the_probe_lets_pass_what_is_exact(model_type: str, attention: str) -> None:
    model = model_of(model_type, attention)
    assert why_not_apart(model, longest=62) is None
    assert not model.training


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("how", ["mask", "masks by kind of layer", "mask of the encoder"])
def test_types_that_mix_documents_say_so_and_the_probe_would_find_them(
    model_type: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type)
    assert why_not_apart(model, longest=62) == f"transformers has no way to keep them apart in {model_type} models"
    row = replace(MODEL_TYPES[model_type], documents=how)
    monkeypatch.setitem(MODEL_TYPES, model_type, row)  # type: ignore[arg-type]
    reason = why_not_apart(model, longest=62)
    assert reason is not None
    assert "other predictions" in reason or "takes no mask of documents" in reason


def test_rows_beyond_a_window_that_the_mask_passes_over_are_found() -> None:
    model = tiny_model("ultrabert", sliding_window=8)
    assert "other predictions" in str(why_not_apart(model, longest=40))
    assert why_not_apart(model, longest=9) is None


def test_a_setting_that_mixes_documents_is_found() -> None:
    """DeBERTa-v2's largest models have a convolution over the row."""
    config = tiny_config("deberta-v2")
    config.conv_kernel_size, config.conv_act = 3, "gelu"
    model = AutoModelForMaskedLM.from_config(config).eval()
    assert why_not_apart(tiny_model("deberta-v2"), longest=62) is None
    assert why_not_apart(model, longest=62) is not None


def test_attention_code_that_takes_no_mask_of_numbers_is_told() -> None:
    model = tiny_model("bert")
    model.config._attn_implementation = "flex_attention"
    assert why_not_apart(model, longest=62) == (
        "attn_implementation flex_attention does not take documents here; eager, sdpa and flash_attention_2 do"
    )


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What the kernel of flash attention computes, by its signature, in plain torch: (tokens, heads, size)."""
    assert not causal
    assert cu_seqlens_q.dtype == torch.int32
    parts = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        assert end - start <= max_seqlen_q == max_seqlen_k
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        places = torch.arange(end - start)
        near = (places[:, None] - places).abs() <= (window_size[0] if window_size[0] >= 0 else end)
        given = functional.scaled_dot_product_attention(query, key, value, attn_mask=near, scale=softmax_scale)
        parts.append(given.transpose(0, 1))
    return torch.cat(parts)


def whole_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    rows, length = q.shape[:2]
    edges = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return varlen(*flat, edges, edges, length, length, 0.0, softmax_scale, causal, window_size).view(q.shape)


@pytest.mark.parametrize(
    "model_type", [name for name in TAKE_DOCUMENTS if "flash_attention_2" in MODEL_TYPES[name].attention]
)
def test_flash_attention_is_told_where_documents_start(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernel is transformers' own; the kernel needs a GPU, and is computed in plain torch here."""
    kernels = (whole_rows, varlen, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **options: kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    windows = {"sliding_window": 4} if model_type == "ultrabert" else WINDOWS.get(model_type, {})
    model: Any = tiny_model(model_type, **windows).double()
    expected = loss_alone(model)
    wanted = gradients(model, expected)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.get_text_config()._attn_implementation = "flash_attention_2"
    batch = collated(documents())
    labels = batch.pop("labels")
    total = sum_over_masked(model, batch, labels, cross_entropy_sum, door=None)
    # eager attention, the reference, has a softmax in float32 in some types
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    scale = max(1.0, *(float(g.abs().max()) for g in wanted))
    given = gradients(model, total)
    assert max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)) < 1e-5 * scale
    assert why_not_apart(model, longest=62) is None


def test_an_unknown_type_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    monkeypatch.delitem(MODEL_TYPES, "bert")  # type: ignore[arg-type]
    assert "no way to keep them apart in bert" in str(why_not_apart(model, longest=62))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_nothing_is_nan_and_documents_stay_apart(attention: str, dtype: torch.dtype) -> None:
    batch = collated(documents(), pad_to=60)
    batch.pop("labels")
    full = model_of("bert", attention)
    with torch.no_grad():
        with documents_apart(full, batch) as inputs:
            expected = full(**inputs).logits
        with torch.autocast("cpu", dtype=dtype), documents_apart(full, batch) as inputs:
            assert inputs["attention_mask"].dtype == dtype
            mixed = full(**inputs).logits
        held = model_of("bert", attention).to(dtype)
        assert why_not_apart(held, longest=62) is None
        with documents_apart(held, batch) as inputs:
            half = held(**inputs).logits
    assert float((mixed - expected).abs().max()) < 0.3
    assert float((half - expected).abs().max()) < 0.3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_is_never_nan(side: str) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.padding_side = side
    collator = from_tokenizer(tokenizer, mlm_probability=0.4, fixed=True, pad_to=60)
    rows = [{"input_ids": np.concatenate(row), DOCUMENT_LENGTHS: [len(one) for one in row]} for row in documents()]
    batch = collator(rows)
    model = model_of("roberta", "sdpa").double()
    total = sum_over_masked(
        model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"], cross_entropy_sum, door=None
    )
    assert total.item() == pytest.approx(loss_alone(model).item(), abs=1e-9)
    with torch.no_grad(), documents_apart(model, batch) as inputs:
        logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
    assert not logits.isnan().any()


@pytest.mark.parametrize("model_type", AFTER_PADDING)
def test_positions_are_those_that_the_model_counts_itself(model_type: str) -> None:
    """From the padding's on in RoBERTa and its kin, and past padding tokens that stand in the text."""
    model = model_of(model_type)
    seen: list[torch.Tensor] = []
    table = next(m for n, m in model.named_modules() if n.endswith(".position_embeddings"))
    handle = table.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    rows = [[np.array([0, 5, 1, 7, 2]), np.array([0, 8, 2])]]
    batch = collated(rows)
    batch.pop("labels")
    with torch.no_grad():
        with documents_apart(model, batch) as inputs:
            model(**inputs)
        for one in rows[0]:
            ids = torch.from_numpy(one)[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    handle.remove()
    assert seen[0].tolist() == torch.cat(seen[1:], dim=1).tolist()
    assert seen[0][0].tolist() == [2, 3, 1, 4, 5, 2, 3, 4]


@pytest.mark.parametrize("options", [{"modules_to_save": ["position_embeddings"]}, {"target": True}])
def test_positions_are_right_where_their_table_is_trained_or_adapted(options: dict[str, Any]) -> None:
    """PEFT then puts the table inside a module of its own."""
    base = model_of("roberta")
    limit = position_limit(base)
    config = LoraConfig(
        r=2,
        target_modules=["query", "position_embeddings"] if options.get("target") else ["query"],
        modules_to_save=options.get("modules_to_save"),
    )
    adapted = get_peft_model(base, config).double().eval()
    perturb(adapted)
    assert position_limit(base) == limit
    check_against_documents_alone(adapted, 1e-9)


def test_positions_without_a_padding_position_start_at_zero() -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 2, 3, 3, 0, 0]])
    ids = torch.ones_like(numbers)
    assert positions_in_documents(numbers, ids, None).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]


def test_a_batch_without_numbers_and_a_model_afterwards_are_as_they_were() -> None:
    model = model_of("esm")
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    plain = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    with documents_apart(model, plain) as inputs:
        assert inputs == plain
    batch = collated(documents())
    with documents_apart(model, batch):
        pass
    assert before == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
