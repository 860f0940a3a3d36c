"""What is asked for an adapter: settled into one form, or refused in one sentence before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_mlm.config import Arguments, read_arguments, write_arguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.method_options import method_options
from peft_mlm.methods import METHODS, VARIANTS, usable_methods
from peft_mlm.peft_rules import LORA_FLAGS, OWN_OPTIONS, TARGET_FLAGS, UNUSED, active_variants

BASE = {"model_name_or_path": "base", "train_file": "a.txt", "output_dir": "out"}


def read(**values: Any) -> Arguments:
    return read_arguments(values=BASE | values)


def faults(**values: Any) -> list[str]:
    with pytest.raises(ArgumentsError) as caught:
        read(**values)
    return caught.value.faults


@pytest.mark.parametrize("method", usable_methods())
def test_every_usable_method_is_taken_by_its_name(method: str) -> None:
    options = {"peft_config": {"token_indices": [5]}} if method == "trainable_tokens" else {}
    for name in (method, method.upper(), method.replace("_", "-")):
        arguments = read(peft_method=name, **options)
        assert arguments.peft is not None
        assert arguments.peft.peft_method == method
        assert arguments.training["learning_rate"] == 3e-4


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.refused])
def test_a_method_that_cannot_serve_is_refused_with_the_reason_and_those_that_can(method: str) -> None:
    (fault,) = faults(peft_method=method)
    assert METHODS[method].refused in fault
    assert ", ".join(usable_methods()) in fault


@pytest.mark.parametrize(("bits", "kind"), [("nf4", "nf4"), ("fp4", "fp4"), (None, "int8")])
def test_a_method_that_is_wrong_on_a_quantised_base_is_refused_by_its_row(bits: str | None, kind: str) -> None:
    base = {"load_in_4bit": True, "bnb_4bit_quant_type": bits} if bits else {"load_in_8bit": True}
    for method, row in METHODS.items():
        if kind in row.bases:
            (fault,) = faults(peft_method=method, **base)
            assert row.bases[kind] in fault  # type: ignore[index]
            assert "Use a float base, or one of: adalora" in fault
    read(peft_method="lora", **base)


VARIANT_SAMPLES: dict[str, Any] = {
    "dora": True,
    "alora": [5],
    "layer_replication": [[0, 1]],
    "target_parameters": ["query.weight"],
    "qalora": True,
    "asa": True,
}


@pytest.mark.parametrize("variant", [name for name, row in VARIANTS.items() if row.refused or row.bases])
def test_a_variant_that_is_refused_is_refused_by_its_row(variant: str) -> None:
    row = VARIANTS[variant]
    value = str(row.values[0]).replace("*", "4") if row.values else VARIANT_SAMPLES.get(variant, {})
    given = {"peft_method": row.method, "peft_config": {row.option: value}}
    assert variant in active_variants(row.method, {row.option: value})
    if row.refused:
        assert any(row.refused in fault for fault in faults(**given))
        return
    for kind, reason in row.bases.items():
        base: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
        base |= {"bnb_4bit_quant_type": kind} if kind in ("nf4", "fp4") else {}
        (fault,) = faults(**given, **({} if kind == "float" else base))
        assert reason in fault
        assert "Leave it out, or use" in fault
    if "float" not in row.bases:
        read(**given)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_method": "vara"}, "there is no such method. Nearest: vera"),
        ({"peft_method": "zzz"}, "there is no such method. Methods: adalora, adamss"),
        ({"peft_method": "dora"}, "it is a variant of lora; give peft_method lora and --use_dora."),
        ({"peft_method": "pissa"}, "give peft_method lora and --init_lora_weights pissa."),
        ({"peft_method": "kasa"}, "give peft_method lora and peft_config kasa_config."),
        ({"peft_method": "vera", "use_lora": True}, "use_lora and peft_method vera are both given"),
        ({"peft_config": {"r": 4}}, "peft_config is given, but no adapter is asked for: add --use_lora"),
        ({"peft_method": "vera", "adapter_name_or_path": "a"}, "peft_method is given together with adapter_name"),
        ({"peft_method": "vera", "peft_config": {"vector_length": 4}}, "It belongs to vblora."),
        ({"peft_method": "vera", "peft_config": {"task_type": "CAUSAL_LM"}}, "PEFT has no task type"),
        ({"peft_method": "vera", "peft_config": {"peft_type": "VERA"}}, "give peft_method"),
        ({"peft_method": "lora", "peft_config": {"revision": "a"}}, "give model_revision"),
        ({"peft_method": "lora", "peft_config": {"trainable_token_indices": [3]}}, "give add_tokens"),
        ({"peft_method": "lora", "lora_r": 4, "peft_config": {"r": 8}}, "lora_r and peft_config say different things"),
        ({"peft_method": "vera", "lora_r": 4, "peft_config": {"r": 8}}, "lora_r and r in peft_config are both given"),
        (
            {"peft_method": "vera", "lora_alpha": 4},
            "vera has no such option: leave it out, or give its own by peft_conf",
        ),
        ({"peft_method": "vera", "use_dora": True}, "use_dora is given, but peft_method vera has no such option"),
        ({"peft_method": "vera", "use_lorafa": True}, "use_lorafa is given, but it is for LoRA's matrices"),
        ({"peft_method": "adalora", "lora_r": 4}, "give its own by peft_config: init_r and target_r"),
        ({"peft_method": "adalora", "peft_config": {"r": 4}}, "adalora does not use r: give init_r and target_r"),
        ({"peft_method": "vera", "lora_r": 0}, "lora_r is 0: it must be at least 1"),
        ({"use_lora": True, "peft_config": {"r": "0"}}, "lora_r is 0: it must be at least 1"),
        ({"use_lora": True, "init_lora_weights": "pisa"}, "init_lora_weights is 'pisa': it must be one of true, gauss"),
        ({"use_lora": True, "init_lora_weights": "pissa_niter_x"}, "pissa, pissa_niter_*, olora"),
        ({"peft_method": "trainable_tokens"}, "none is named: add tokens by add_tokens"),
        (
            {"peft_method": "trainable_tokens", "peft_config": {"token_indices": [3]}, "modules_to_save": ["cls"]},
            "trainable_tokens has no such option",
        ),
        ({"vera_dropout": 0.1}, "It is an option of vera: give it in peft_config."),
        (
            {"model_type": "bert", "tokenizer_name": "t", "model_name_or_path": None, "peft_method": "vera"},
            "random weig",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(values: dict[str, Any], said: str) -> None:
    (fault,) = faults(**values)
    assert said in fault


def test_lora_s_own_options_move_into_its_arguments() -> None:
    arguments = read(
        peft_method="lora",
        peft_config={"r": "4", "lora_alpha": 8, "init_lora_weights": False, "target_modules": "query", "bias": "all"},
    )
    peft = arguments.peft
    assert peft is not None
    assert (peft.lora_r, peft.lora_alpha, peft.init_lora_weights) == (4, 8, "false")
    assert peft.lora_target_modules == ["query"]
    assert peft.peft_config == {"bias": "all"}
    assert arguments.sources["lora_r"] == "dict"


def test_arguments_of_lora_s_move_into_the_options_of_a_method_that_has_them() -> None:
    peft = read(peft_method="hira", lora_r="6", rank_pattern={"query": 2}, lora_target_modules="query,value").peft
    assert peft is not None
    assert peft.peft_config == {"r": 6, "rank_pattern": {"query": 2}}
    assert peft.lora_target_modules == ["query", "value"]
    peft = read(peft_method="vera").peft
    assert peft is not None
    assert peft.peft_config is None  # PEFT's default of 256, not LoRA's 8


@pytest.mark.parametrize(
    "values",
    [
        {"peft_method": "hira", "lora_r": 6, "peft_config": {"hira_dropout": "0.1"}},
        {"peft_method": "lora", "lora_r": 6, "peft_config": {"lora_bias": True, "target_modules": ["query"]}},
        {"use_lora": True, "peft_config": {"eva_config": {"rho": 2}}, "init_lora_weights": "eva"},
        {"peft_method": "ia3", "modules_to_save": ["cls"]},
    ],
)
def test_what_is_written_is_read_back_to_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    arguments = read(**values)
    write_arguments(arguments, tmp_path / "arguments.yaml")
    again = read_arguments(tmp_path / "arguments.yaml")
    assert again.peft == arguments.peft
    assert again.model == arguments.model


def test_a_method_given_later_sets_aside_the_adapter_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("use_lora: true\nlora_r: 4\nmodel_name_or_path: b\ntrain_file: a.txt\nmodules_to_save: [cls]\n")
    peft = read_arguments(file, ["--peft_method", "vera", "--output_dir", "o"]).peft
    assert peft is not None
    assert (peft.use_lora, peft.peft_method, peft.peft_config) == (False, "vera", None)
    assert peft.modules_to_save == ["cls"]
    peft = read_arguments(file, ["--peft_method", "lora", "--output_dir", "o"]).peft
    assert peft is not None
    assert (peft.peft_method, peft.lora_r) == ("lora", 4)
    assert read_arguments(file, ["--no_use_lora", "--output_dir", "o"]).peft is None


def test_options_may_be_a_block_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("peft_method: vera\npeft_config:\n  r: 32\n  vera_dropout: 1e-1\n")
    flags = ["--model_name_or_path", "b", "--train_file", "a.txt", "--output_dir", "o"]
    peft = read_arguments(file, flags).peft
    assert peft is not None
    assert peft.peft_config == {"r": 32, "vera_dropout": 0.1}
    peft = read_arguments(None, [*flags, "--peft_method", "vera", "--peft_config", '{"r": "1e1"}']).peft
    assert peft is not None
    assert peft.peft_config == {"r": 10}


def test_the_tables_name_options_that_exist() -> None:
    known = {name for method in METHODS for name in method_options(method)}
    assert set(LORA_FLAGS.values()) | set(TARGET_FLAGS.values()) <= known
    common = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
    assert set(OWN_OPTIONS) <= known | common | {"peft_version"}
    for method, option in UNUSED:
        assert option in method_options(method)
    for method, row in METHODS.items():
        assert {*row.defaults, *row.divides} <= set(method_options(method))
        assert row.refused or not row.start_option or row.start_option in method_options(method)
    optimisers = ("loraplus_lr_ratio", "use_lorafa")
    for row_ in VARIANTS.values():
        assert row_.option in method_options(row_.method) or row_.option in optimisers
