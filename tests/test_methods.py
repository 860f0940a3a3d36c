"""Every row of the table of methods, run: its start, its merge, its bases, and what plain PEFT does instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError, MergeError
from peft_mlm.merging import merge_adapter
from peft_mlm.methods import METHODS, QUANTISED, VARIANTS, Base, usable_methods
from peft_mlm.peft_rules import why_not_base
from tests.matrix_of_methods import (
    BASES,
    VARIANT_OPTIONS,
    Cell,
    cells,
    difference,
    load_base_of_kind,
    logits,
    options_of,
    quietly,
    run_cell,
    run_plain_cell,
    save_tiny_base,
)
from tests.tiny import letter_tokenizer, perturb

USABLE = [name for name, row in METHODS.items() if not row.refused]
OTHER_TYPES = ("roberta", "esm", "modernbert")
EXACT = 1e-5
# What LLM.int8 rounds the inputs of its layers by, which a dequantised layer does not.
INT8_ROUNDING = 0.1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("one_layer"), layers=1)


@pytest.fixture(scope="module")
def other_types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_base(tmp_path_factory.mktemp(name), name, layers=1) for name in OTHER_TYPES}


def refusal(method: str, variant: str | None, base: Base) -> str:
    """What the tables say against a cell."""
    return METHODS[method].bases.get(base, "") or (VARIANTS[variant].bases.get(base, "") if variant else "")


def fine_cells(base: Base) -> list[tuple[str, str | None]]:
    return [cell for cell in cells() if not refusal(*cell, base)]


def refused_cells(base: Base) -> list[tuple[str, str | None]]:
    return [cell for cell in cells() if refusal(*cell, base)]


def arguments_of(method: str, variant: str | None = None, **options: Any) -> PEFTArguments:
    return PEFTArguments(peft_method=method, peft_config=options_of(method, variant) | options)


def plain(folder: Path, method: str, variant: str | None, base: Base, **options: Any) -> Cell:
    """A cell by plain PEFT, on the query and the way into the feed-forward layer."""
    given = options_of(method, variant) | options
    if method == "trainable_tokens":
        given["target_modules"] = ["word_embeddings"]
    else:
        given.setdefault("target_modules", ["query", "intermediate.dense"])
    with quietly():
        config = getattr(peft, METHODS[method].config)(**given)
    return run_plain_cell(folder, method, variant, base, config)


def test_the_table_is_peft_s_own_list_of_methods() -> None:
    assert set(METHODS) == {kind.value.lower() for kind in peft.PeftType}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert METHODS[kind.value.lower()].config == config.__name__
        assert getattr(peft, config.__name__) is config


def test_every_row_has_a_source_and_every_variant_a_method() -> None:
    papers = {name: row.paper for name, row in METHODS.items()} | {name: row.paper for name, row in VARIANTS.items()}
    for name, paper in papers.items():
        assert paper.startswith("https://"), name
    for variant in VARIANTS.values():
        assert variant.method in METHODS


@pytest.mark.parametrize(("method", "variant"), cells())
def test_on_a_float_base_it_trains_reloads_and_merges(tiny: Path, method: str, variant: str | None) -> None:
    cell = run_cell(tiny, method, variant, "float")
    check_that_it_works(cell)
    starts_elsewhere = bool(why_not_base(method, options_of(method, variant)))
    assert starts_elsewhere == (cell.start > 10 * EXACT), cell.start


@pytest.mark.parametrize("method", USABLE)
def test_it_works_on_other_model_types_too(other_types: dict[str, Path], method: str) -> None:
    # ModernBERT's layers have no biases for BEFT to train.
    model_type = "esm" if method == "beft" else OTHER_TYPES[USABLE.index(method) % len(OTHER_TYPES)]
    check_that_it_works(run_cell(other_types[model_type], method, None, "float"))


@pytest.mark.parametrize(("method", "variant"), fine_cells("nf4"))
def test_on_a_4_bit_base_it_trains_reloads_and_merges(one_layer: Path, method: str, variant: str | None) -> None:
    cell = run_cell(one_layer, method, variant, "nf4")
    check_that_it_works(cell)
    assert cell.dequantised is not None
    assert cell.dequantised < EXACT


@pytest.mark.parametrize("method", usable_methods("fp4"))
def test_on_the_other_kind_of_4_bits_too(one_layer: Path, method: str) -> None:
    cell = run_cell(one_layer, method, None, "fp4")
    check_that_it_works(cell)
    assert cell.dequantised is not None
    assert cell.dequantised < EXACT


@pytest.mark.parametrize(("method", "variant"), fine_cells("int8"))
def test_on_an_8_bit_base_it_trains_reloads_and_merges(one_layer: Path, method: str, variant: str | None) -> None:
    cell = run_cell(one_layer, method, variant, "int8")
    check_that_it_works(cell)
    assert cell.dequantised is not None
    assert cell.dequantised < INT8_ROUNDING


def check_that_it_works(cell: Cell) -> None:
    """Trained without a dead parameter, the same after reloading, and the same merged."""
    assert cell.failed == ""
    assert cell.trainable > 0
    assert cell.finite
    assert cell.without_gradient == []
    assert cell.effect > 1e-3
    assert cell.reload < EXACT
    if METHODS[cell.method].merge:
        assert cell.merge is None
    else:
        assert cell.merge is not None
        assert cell.merge < EXACT


@pytest.mark.parametrize("base", BASES)
def test_what_the_table_refuses_on_a_base_is_refused_before_anything_is_trained(one_layer: Path, base: Base) -> None:
    model = load_base_of_kind(one_layer, base)
    for method, variant in refused_cells(base):
        with pytest.raises(AdapterError, match=r"cannot be used on a (float base|base in)"):
            plan_adapter(model, arguments_of(method, variant))
    assert all(type(module).__module__.split(".")[0] != "peft" for module in model.modules())


@pytest.mark.parametrize(
    ("method", "variant", "base"), [(*cell, base) for base in ("nf4", "int8") for cell in refused_cells(base)]
)
def test_what_is_refused_on_a_quantised_base_fails_or_is_wrong_with_plain_peft(
    one_layer: Path, method: str, variant: str | None, base: Base
) -> None:
    cell = plain(one_layer, method, variant, base)
    ignored = variant is not None and cell.trainable == plain(one_layer, "lora", None, base).trainable
    allowed = EXACT if base == "nf4" else INT8_ROUNDING
    off = cell.dequantised is not None and cell.dequantised > allowed
    started_elsewhere = cell.start > INT8_ROUNDING
    assert cell.failed or ignored or off or started_elsewhere or cell.effect == 0.0, cell


# Faults of plain PEFT that raise no error: (method, options, base, what is seen of it).
SILENT: list[tuple[str, dict[str, Any], Base, str]] = [
    ("unilora", {}, "nf4", "no effect"),
    ("unilora", {}, "int8", "no effect"),
    ("deft", {}, "int8", "wrong start"),
    ("hra", {}, "int8", "wrong start"),
    ("peanut", {}, "int8", "wrong dequantised"),
    ("lora", {"init_lora_weights": "olora"}, "nf4", "wrong dequantised"),
    ("lora", VARIANT_OPTIONS["kasa"], "nf4", "plain LoRA"),
    ("lora", VARIANT_OPTIONS["kasa"], "int8", "plain LoRA"),
    ("lora", {"monteclora_config": {}}, "nf4", "plain LoRA"),
    ("lora", {"monteclora_config": {}}, "int8", "plain LoRA"),
    ("lora", {"use_qalora": True}, "float", "plain LoRA"),
    ("lora", {"alora_invocation_tokens": [22, 23]}, "float", "no effect"),
    ("lora", {"layer_replication": [(0, 1), (0, 1)]}, "float", "wrong merge"),
]


@pytest.mark.parametrize(("method", "options", "base", "seen"), SILENT)
def test_what_plain_peft_gets_wrong_without_an_error_is_refused(
    one_layer: Path, method: str, options: dict[str, Any], base: Base, seen: str
) -> None:
    cell = plain(one_layer, method, None, base, **options)
    assert not cell.failed or cell.failed.startswith("merge"), cell.failed
    if seen == "no effect":
        assert cell.effect == 0.0
    elif seen == "wrong start":
        assert cell.start > 0.5
    elif seen == "wrong dequantised":
        assert cell.dequantised is not None
        assert cell.dequantised > 0.02
    elif seen == "wrong merge":
        assert cell.merge is not None
        assert cell.merge > 0.02
    else:
        same = plain(one_layer, "lora", None, base)
        assert (cell.trainable, cell.effect) == (same.trainable, same.effect)
    with pytest.raises(AdapterError, match="cannot be used"):
        plan_adapter(load_base_of_kind(one_layer, base), arguments_of(method, **options))


def test_trained_token_rows_keep_the_decoder_s_bias(tiny: Path) -> None:
    """Plain PEFT leaves it out, so that the model is another one before the first step."""
    assert plain(tiny, "trainable_tokens", None, "float").start > 0.02
    assert run_cell(tiny, "trainable_tokens", None, "float").start < EXACT


def test_an_8_bit_base_merged_by_plain_peft_is_off_where_the_dequantised_one_is_exact(one_layer: Path) -> None:
    with quietly():
        torch.manual_seed(0)
        config = peft.C3AConfig(target_modules=["query", "intermediate.dense"], block_size=64)
        model = peft.get_peft_model(load_base_of_kind(one_layer, "int8"), config)
        before = logits(model)
        assert difference(logits(model.merge_and_unload()), before) > 0.5
    merge = run_cell(one_layer, "c3a", None, "int8").merge
    assert merge is not None
    assert merge < EXACT


@pytest.mark.parametrize("method", [name for name in USABLE if METHODS[name].start_option])
def test_a_start_that_is_not_the_base_is_told(one_layer: Path, method: str) -> None:
    row = METHODS[method]
    for value in (False, *row.same_start):
        if method == "adamss" and value is False:
            continue  # it takes one word only
        if method == "tinylora" and value is False:
            continue  # refused, below
        base = load_base_of_kind(one_layer, "float")
        before = logits(base)
        with quietly():
            plan = plan_adapter(base, arguments_of(method, **{row.start_option: value}), total_steps=100)
            moved = difference(logits(wrap(base, plan)), before)
        told = any("does not start as the base" in notice for notice in plan.notices)
        assert told == (moved > 10 * EXACT), (value, moved, plan.notices)


def test_no_start_leaves_weights_as_the_memory_happens_to_be(one_layer: Path) -> None:
    """PEFT's TinyLoRA does with init_weights false: it trains on what lay there before, or on NaN."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True  # with NaN
    try:
        for method in USABLE:
            option = METHODS[method].start_option
            both: list[dict[str, Any]] = [{}, {option: False}]
            for options in both if option and method not in ("adamss", "tinylora") else both[:1]:
                base = load_base_of_kind(one_layer, "float")
                with quietly():
                    model = wrap(base, plan_adapter(base, arguments_of(method, **options), total_steps=100))
                wrong = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
                assert not wrong, (method, options, wrong)
        with quietly():
            config = peft.TinyLoraConfig(target_modules=["query"], init_weights=False)
            model = peft.get_peft_model(load_base_of_kind(one_layer, "float"), config)
        assert any(torch.isnan(p).any() for p in model.parameters())
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before
    with pytest.raises(AdapterError, match="as the memory happens to be"):
        plan_adapter(load_base_of_kind(one_layer, "float"), arguments_of("tinylora", init_weights=False))


def test_the_merge_of_every_method_is_exact_and_proved(one_layer: Path, tmp_path: Path) -> None:
    for method in USABLE:
        base = load_base_of_kind(one_layer, "float")
        with quietly():
            model = wrap(base, plan_adapter(base, arguments_of(method), total_steps=100))
            # RandLoRA's factors are so large that what is moved by more cannot be held in float32.
            perturb(model, scale=0.01 if method == "randlora" else 0.1)
            if METHODS[method].merge:
                with pytest.raises(MergeError, match="cannot be merged"):
                    merge_adapter(model, letter_tokenizer(), tmp_path / method)
            else:
                report = merge_adapter(model, letter_tokenizer(), tmp_path / method)
                assert report.max_abs_logit_diff < EXACT, method


@pytest.mark.parametrize("base", QUANTISED)
def test_the_methods_it_names_instead_are_fine_there(base: Base) -> None:
    named = usable_methods(base)
    assert {"lora", "vera", "boft", "ln_tuning"} <= set(named)
    assert not any(METHODS[name].refused or base in METHODS[name].bases for name in named)
