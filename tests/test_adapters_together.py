"""Every method and variant, twice on one base: each adapter against itself alone, and rows of one batch mixed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.adapter_set import AdapterSet, load_adapters
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.loading import load
from peft_mlm.model import load_base
from tests.matrix_of_methods import cells, options_of, quietly
from tests.tiny import difference, logits_at, perturb, same, save_base

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2], [0, 5, 9, 7, 4, 12, 20, 2]])
MASK = torch.ones_like(IDS)
# In one batch the sums of a layer are made in another order than in three.
ROUNDING = 1e-5
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
HEAD, HEAD_PART = "cls.predictions.transform", "cls.predictions.transform.dense"
# Methods, and variants of LoRA, that cannot share a base at all.
ALONE = {"trainable_tokens", "bias", "pissa", "olora", "kasa"}
# Kinds of LoRA adapters that may stand beside each other, but for two that meet in one module.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"lora_r": 16, "use_rslora": True},
    "two_layers": {"lora_target_modules": ["query", "value"], "peft_config": {"lora_bias": True}},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": [HEAD]},
    "inside_head": {"lora_target_modules": ["query", HEAD_PART]},
}
MIXED_KINDS = {"plain", "wide", "two_layers", "inside_head"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quietly():
        return save_base(tmp_path_factory.mktemp("bert"), "bert", **WIDTHS)


def make_adapter(base: Path, folder: Path, seed: int, **options: Any) -> str:
    """An adapter as training leaves it: every part of it moved away from its start."""
    with quietly():
        torch.manual_seed(seed)
        loaded = load_base(ModelArguments(model_name_or_path=str(base)))
        arguments = PEFTArguments(**{"peft_method": "lora", **options})
        model = wrap(loaded.model, plan_adapter(loaded.model, arguments, total_steps=100))
        perturb(model, seed=seed + 1)
        save_adapter(model, folder, base_name=str(base))
    return str(folder)


def alone(adapter: str) -> torch.Tensor:
    with quietly():
        return logits_at(load(adapter).model, IDS)


def options_of_cell(method: str, variant: str | None) -> dict[str, Any]:
    # AdaMSS takes a second per layer.
    named = ["query"] if method == "adamss" else None
    return {"peft_method": method, "peft_config": options_of(method, variant), "lora_target_modules": named}


def check_switching(together: AdapterSet, expected: dict[str | None, torch.Tensor]) -> None:
    """Each adapter, in any order, and the base between them."""
    for name in (*expected, *reversed(expected)):
        assert same(logits_at(together.use(name), IDS), expected[name]), name


@pytest.mark.parametrize(("method", "variant"), cells())
def test_two_of_a_kind_compute_what_each_computes_alone_or_are_refused(
    method: str, variant: str | None, bert: Path, tmp_path: Path
) -> None:
    options = options_of_cell(method, variant)
    paths = {name: make_adapter(bert, tmp_path / name, seed, **options) for seed, name in enumerate(("a", "ab", "c"))}
    two = {name: paths[name] for name in ("a", "ab")}
    if {method, variant} & ALONE:
        with pytest.raises(AdapterError, match=r"Load (it by itself|them apart)"):
            load_adapters(two)
        return
    with quietly():
        together = load_adapters(two)
        base = logits_at(load_base(ModelArguments(model_name_or_path=str(bert))).model, IDS)
    first, second = alone(paths["a"]), alone(paths["ab"])
    assert difference(first, second) > 1e-3
    check_switching(together, {"a": first, None: base, "ab": second})
    together.use("ab")
    with quietly():
        together.replace("ab", paths["c"])
    assert together.active == "ab"
    check_switching(together, {"ab": alone(paths["c"]), None: base, "a": first})
    if method in ("lora", "glora", "road") and variant != "dora":
        rows = together.logits(IDS, MASK, ["ab", None, "a"])
        expected = torch.stack([alone(paths["c"])[0], base[1], first[2]])
        assert difference(rows, expected) < ROUNDING
    else:
        with pytest.raises(AdapterError, match="cannot be mixed with others in one batch"):
            together.logits(IDS, MASK, ["ab", None, "a"])


@pytest.fixture(scope="module")
def kinds(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, torch.Tensor]]:
    """One adapter of each kind, with its logits alone."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {name: make_adapter(bert, folder / name, seed, **{"lora_r": 4, **options})
            for seed, (name, options) in enumerate(KINDS.items())}  # fmt: skip
    return {name: (path, alone(path)) for name, path in made.items()}


@pytest.mark.parametrize("pair", itertools.permutations(KINDS, 2), ids="-".join)
def test_unlike_lora_adapters_compute_what_each_computes_alone_or_are_refused(
    pair: tuple[str, str], kinds: dict[str, tuple[str, torch.Tensor]]
) -> None:
    paths = {name: kinds[name][0] for name in pair}
    if set(pair) == {"head", "inside_head"}:  # PEFT gives one of them other numbers, or fails
        with pytest.raises(AdapterError, match="inside_head changes a part of it"):
            load_adapters(paths)
        return
    with quietly():
        together = load_adapters(paths)
    check_switching(together, {name: kinds[name][1] for name in pair})
    names = [pair[1], pair[0], pair[1]]
    if set(pair) <= MIXED_KINDS:
        expected = torch.stack([kinds[name][1][row] for row, name in enumerate(names)])
        assert difference(together.logits(IDS, MASK, names), expected) < ROUNDING
    else:
        with pytest.raises(AdapterError, match="cannot be mixed"):
            together.logits(IDS, MASK, names)
    # the refusal left nothing behind
    check_switching(together, {name: kinds[name][1] for name in pair})


# Types some of whose adapted layers get other things than one piece per row.
NOT_BY_ROWS = ("deberta", "longformer")
BY_ROWS = ("albert", "esm", "modernbert", "neomme", "squeezebert")


@pytest.mark.parametrize("model_type", BY_ROWS + NOT_BY_ROWS)
def test_each_type_mixes_rows_exactly_or_refuses(model_type: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", model_type)
    paths = {name: make_adapter(base, tmp_path / name, seed, lora_r=2) for seed, name in enumerate("ab")}
    with quietly():
        together = load_adapters(paths)
    if model_type in NOT_BY_ROWS:
        with pytest.raises(AdapterError, match="does not get the rows of a batch one by one"):
            together.logits(IDS, MASK, ["a", "b", "a"])
        return
    expected = {name: logits_at(together.use(name), IDS) for name in "ab"}
    mixed = together.logits(IDS, MASK, ["a", "b", "a"])
    assert difference(mixed, torch.stack([expected["a"][0], expected["b"][1], expected["a"][2]])) < ROUNDING
    assert difference(expected["a"], expected["b"]) > 1e-3
