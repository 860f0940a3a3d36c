"""The options of each method, read from PEFT's source text without importing it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import MISSING
from typing import Any

import peft
import pytest
from peft.tuners.lora.config import EvaConfig, KasaConfig

from peft_mlm.method_options import convert_options, method_options, methods_with
from peft_mlm.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_names_and_defaults_are_those_of_the_class_of_options(method: str) -> None:
    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    real = {
        field.name: field
        for field in dataclasses.fields(getattr(peft, METHODS[method].config))
        if field.name not in common and field.init
    }
    read = method_options(method)
    assert set(read) == set(real)
    for name, option in read.items():
        field = real[name]
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        # an enumeration's member, or an object of options, is no literal
        assert option.default is MISSING or option.default == default, name


def test_every_option_of_a_usable_method_can_be_written_down() -> None:
    for method, row in METHODS.items():
        if not row.refused:
            assert [option.name for option in method_options(method).values() if option.type.unknown] == []


def test_reading_them_imports_neither_peft_nor_torch() -> None:
    code = (
        "import sys; from peft_mlm.method_options import method_options; method_options('lora'); "
        "print([name for name in ('peft', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("method", "given", "converted"),
    [
        ("vera", {"r": "64", "vera_dropout": "1e-1"}, {"r": 64, "vera_dropout": 0.1}),
        ("lora", {"init_lora_weights": "true"}, {"init_lora_weights": True}),
        ("lora", {"init_lora_weights": "pissa_niter_16"}, {"init_lora_weights": "pissa_niter_16"}),
        ("lora", {"lora_alpha": 12.5}, {"lora_alpha": 12.5}),
        ("lora", {"eva_config": {"rho": "2"}}, {"eva_config": {"rho": 2.0}}),
        ("road", {"variant": "road_2"}, {"variant": "road_2"}),
        ("c3a", {"init_weights": "gaussian"}, {"init_weights": "gaussian"}),
        ("c3a", {"init_weights": "yes"}, {"init_weights": True}),
        ("hira", {"rank_pattern": {"query": "2"}}, {"rank_pattern": {"query": 2}}),
        ("adalora", {"target_r": "4", "beta1": ".9"}, {"target_r": 4, "beta1": 0.9}),
    ],
)
def test_text_becomes_the_declared_type(method: str, given: dict[str, Any], converted: dict[str, Any]) -> None:
    values, faults = convert_options(method, given)
    assert faults == []
    assert values == converted
    assert {name: type(value) for name, value in values.items()} == {n: type(v) for n, v in converted.items()}


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("vera", {"dropot": 0.1}, "peft_method vera has no option 'dropot'"),
        ("vera", {"d_inital": 0.1}, "Nearest: d_initial"),
        ("vera", {"boft_block_size": 4}, "It belongs to boft. It has: bias, d_initial"),
        ("vera", {"r": "many"}, "peft_config: the value of r, 'many' is not a whole number"),
        ("road", {"group_size": 2.5}, "the value of group_size, 2.5 is not a whole number"),
        ("lora", {"eva_config": {"rhoo": 2}}, "peft_config.eva_config: eva_config has no option 'rhoo'. Nearest: rho"),
        ("lora", {"kasa_config": True}, "the value of kasa_config, true is not a mapping"),
        ("lokr", {"init_weights": "pissa"}, "one of|lycoris"),
    ],
)
def test_what_a_method_does_not_have_is_named_with_what_it_has(method: str, given: dict[str, Any], said: str) -> None:
    values, faults = convert_options(method, given)
    assert not any(values.values())
    (fault,) = faults
    assert any(part in fault for part in said.split("|"))


def test_the_parts_of_an_option_are_those_of_its_class() -> None:
    for name, cls in (("eva_config", EvaConfig), ("kasa_config", KasaConfig)):
        assert set(method_options("lora")[name].parts) == {field.name for field in dataclasses.fields(cls)}


def test_an_option_is_found_in_the_methods_that_have_it() -> None:
    assert methods_with("boft_block_size") == ["boft"]
    assert methods_with("use_dora") == ["adalora", "lora"]
    assert methods_with("no_such_option") == []
