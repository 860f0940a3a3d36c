"""Runs on a base in 4 or 8 bits, from training to a merged model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig

import peft_mlm
from peft_mlm.commands.train import TrainResult, show
from peft_mlm.errors import AdapterError, ArgumentsError
from peft_mlm.merge_proof import probe_logits, probe_rows
from peft_mlm.quantization import quantised_layers
from tests.commands.conftest import Answer, train
from tests.tiny import letter_tokenizer, same, save_base

IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
# Loads a run in a process of its own, and writes its logits.
FRESH = """
import sys, torch, peft_mlm
torch.set_num_threads(1)
ids = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
with torch.no_grad():
    torch.save(peft_mlm.load(sys.argv[1]).model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, sys.argv[2])
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("wide"), "bert", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def nf4(
    wide_base: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    """A finished run on a base in NF4 with double quantisation, and what it gave back."""
    folder = tmp_path_factory.mktemp("runs") / "nf4"
    arguments = {
        "model_name_or_path": wide_base,
        "train_file": text_file,
        "validation_file": held_out,
        "output_dir": folder,
        "use_lora": True,
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "modules_to_save": ["cls"],
        "rows": "line",
        "max_steps": 30,
        "eval_steps": 15,
        "learning_rate": 1e-2,
    }
    return folder, peft_mlm.train(arguments)


@pytest.fixture(scope="module")
def int8(wide_base: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "int8"
    return train(wide_base, text_file, held_out, folder, load_in_8bit=True, llm_int8_threshold=3.0)


def test_a_run_learns_and_says_what_its_base_takes(nf4: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, result = nf4
    assert result.metrics["adapted"]["loss"] < 0.95 * result.metrics["base"]["loss"]
    told = json.loads((run / "summary.json").read_text())["quantisation"]
    assert (told["bits"], told["kind"], told["double_quant"], told["compute_dtype"]) == (4, "nf4", True, "float32")
    assert (told["layers"], told["kept_float"], told["quantised_head"]) == (12, ["cls"], [])
    assert told["memory"]["quantised"] < told["memory"]["bfloat16"]
    show({**result.metrics, "run_folder": str(run)})
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 layers in 4 bits (nf4 with double quantisation), computing in float32" in printed
    assert "quantised 46.9 kB, embeddings 23.3 kB, head 17.3 kB" in printed


def test_the_recipe_lies_with_the_adapter_and_with_each_checkpoint(nf4: Any, int8: Path) -> None:
    run, _ = nf4
    for folder in (run / "adapter", run / "checkpoints" / "checkpoint-15"):
        recipe = json.loads((folder / "base_recipe.json").read_text())
        assert recipe == {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    recipe = json.loads((int8 / "adapter" / "base_recipe.json").read_text())
    assert recipe == {"load_in_8bit": True, "llm_int8_threshold": 3.0}
    assert not any("embed" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))


def test_a_run_and_its_shipped_adapter_reload_exactly_in_a_fresh_process(nf4: Any, tmp_path: Path) -> None:
    run, result = nf4
    expected = logits(result.model)
    assert same(logits(peft_mlm.load(str(run)).model), expected)
    shipped = shutil.copytree(run / "adapter", tmp_path / "shipped")
    base = yaml.safe_load((run / "arguments.yaml").read_text())["model_name_or_path"]
    assert same(logits(peft_mlm.load(str(shipped), base=base).model), expected)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(peft_mlm.__file__).parents[1])}
    words = [sys.executable, "-c", FRESH, str(run), str(tmp_path / "logits.pt")]
    subprocess.run(words, check=True, env=environment, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_the_base_of_a_shipped_adapter_has_the_bits_it_was_trained_in(
    nf4: Any, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run, _ = nf4
    shipped = shutil.copytree(run / "adapter", tmp_path / "shipped")
    base = yaml.safe_load((run / "arguments.yaml").read_text())["model_name_or_path"]
    record = command("evaluate", shipped, run / "arguments.yaml", "--base", base, "--use_base", "--json").record
    expected = json.loads((run / "summary.json").read_text())["base"]["loss"]
    assert record["loss"] == pytest.approx(expected, rel=1e-6)
    given = peft_mlm.fill_mask(str(shipped), "AB<mask>D", base=base, use_base=True)
    of_run = peft_mlm.fill_mask(str(run), "AB<mask>D", use_base=True)
    assert given[0]["masks"][0]["predictions"][0]["probability"] == pytest.approx(
        of_run[0]["masks"][0]["predictions"][0]["probability"], rel=1e-5
    )


@pytest.mark.parametrize("which", ["nf4", "int8"])
def test_evaluate_gives_the_figures_of_the_run(
    which: str, request: pytest.FixtureRequest, command: Callable[..., Answer]
) -> None:
    run = request.getfixturevalue(which)
    run = run[0] if isinstance(run, tuple) else run
    summary = json.loads((run / "summary.json").read_text())
    for words, part in (([], "adapted"), (["--use_base"], "base")):
        record = command("evaluate", run, *words, "--json").record
        assert record["loss"] == pytest.approx(summary[part]["loss"], rel=1e-6)
    float_base = command("evaluate", run, "--use_base", f"--load_in_{4 if which == 'nf4' else 8}bit", "false", "--json")
    assert float_base.record["loss"] != pytest.approx(summary["base"]["loss"], rel=1e-6)


def test_models_and_bases_are_evaluated_and_filled_in_other_bits(
    wide_base: Path, held_out: Path, nf4: Any, command: Callable[..., Answer]
) -> None:
    words = ("--validation_file", held_out, "--rows", "line", "--json")
    losses = {
        bits: command("evaluate", wide_base, *flags, *words).record["loss"]
        for bits, flags in (
            ("float", ()), ("nf4", ("--load_in_4bit",)), ("int8", ("--load_in_8bit",)),
            ("fp4", ("--load_in_4bit", "--bnb_4bit_quant_type", "fp4")),
        )
    }  # fmt: skip
    assert len(set(losses.values())) == 4
    assert all(abs(loss - losses["float"]) < 0.2 for loss in losses.values())
    told = {
        flag: command("fill-mask", wide_base, "ABC<mask>EF", *flag, "--json").record["results"][0]["masks"]
        for flag in ((), ("--load_in_4bit",), ("--load_in_8bit",))
    }
    assert len({json.dumps(masks) for masks in told.values()}) == 3
    run, _ = nf4
    for name in ("evaluate", "fill-mask"):
        text = ("ABC<mask>EF",) if name == "fill-mask" else ()
        assert "an adapter is loaded on its base as" in command(name, run, *text, "--load_in_8bit").fault
        both = command(name, wide_base, *text, "--load_in_8bit", "--load_in_4bit", *(() if text else words[:2]))
        assert "choose one" in both.fault


@pytest.mark.parametrize("which", ["nf4", "int8"])
def test_merging_gives_a_float_model_equal_to_the_dequantised_run(
    which: str, request: pytest.FixtureRequest, wide_base: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run = request.getfixturevalue(which)
    run = run[0] if isinstance(run, tuple) else run
    record = command("merge", run, "--output_dir", tmp_path / "merged", "--json").record
    assert record["max_abs_logit_diff"] < 1e-6
    as_it_ran = record["max_abs_logit_diff_quantised"]
    assert (as_it_ran < 1e-5) if which == "nf4" else (1e-4 < as_it_ran < 0.5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    loaded = peft_mlm.load(str(run))
    rows = probe_rows(merged, loaded.tokenizer)
    difference = probe_logits(loaded.model, rows) - probe_logits(merged.eval(), rows)
    assert float(difference.abs().max()) == pytest.approx(as_it_ran, abs=1e-5)
    original = load_file(wide_base / "model.safetensors")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert weights.keys() == original.keys()
    name = "bert.encoder.layer.0.attention.self.query.bias"
    assert torch.equal(weights[name], original[name])


def test_the_card_s_lines_load_the_same_model_with_plain_libraries(nf4: Any, wide_base: Path) -> None:
    run, result = nf4
    card = (run / "adapter" / "README.md").read_text()
    assert "in 4 bits (nf4, bitsandbytes)" in card
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"THIS_FOLDER"', repr(str(run / "adapter"))).replace('"wide0"', repr(str(wide_base))), names)
    for layer in quantised_layers(names["model"]).values():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes' rounding of an evaluation on some CPUs
    assert (logits(names["model"]) - logits(result.model)).abs().max() < 1e-5


def test_training_goes_on_on_the_base_as_it_was_quantised(
    nf4: Any, wide_base: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run, result = nf4
    changes: dict[str, Any] = {"use_lora": False, "adapter_name_or_path": run / "adapter", "max_steps": 2}
    again = train(wide_base, text_file, held_out, tmp_path / "again", **changes)
    summary = json.loads((again / "summary.json").read_text())
    assert summary["base"]["loss"] == pytest.approx(result.metrics["adapted"]["loss"], rel=1e-6)
    for name in ("base_recipe.json",):
        assert (again / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    with pytest.raises(AdapterError, match="was trained on a base with load_in_4bit True"):
        train(wide_base, text_file, held_out, tmp_path / "other", load_in_8bit=True, **changes)


def test_activation_checkpointing_is_off_unless_asked_for_and_changes_no_figure(
    nf4: Any, wide_base: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    _, result = nf4
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.model.modules())
    losses = []
    for asked in (False, True):
        folder = tmp_path / str(asked)
        train(
            wide_base, text_file, held_out, folder,
            load_in_4bit=True, max_steps=4, eval_steps=4, gradient_checkpointing=asked,
        )  # fmt: skip
        losses.append(json.loads((folder / "summary.json").read_text())["adapted"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"load_in_4bit": True, "use_lora": False}, "load_in_4bit is given without an adapter"),
        ({"load_in_8bit": True, "use_lora": False}, "load_in_8bit is given without an adapter"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both true: choose one"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is given without load_in_4bit: add --load_in_4bit"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type is given without load_in_4bit"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "given without load_in_4bit"),
        ({"load_in_4bit": True, "llm_int8_threshold": 1}, "llm_int8_threshold is given without load_in_8bit"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, "llm_int8_threshold is -1.0: it must be at least 0"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "'nf5' is not one of nf4, fp4"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, "float16 without fp16"),
        (
            {"load_in_4bit": True, "model_name_or_path": None, "model_type": "bert", "tokenizer_name": "x"},
            "model_type makes a model of random weights, which are trained in full and so in float",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_loaded(changes: dict[str, Any], fault: str) -> None:
    arguments = {
        "model_name_or_path": "no/such",
        "train_file": "no.txt",
        "output_dir": "o",
        "use_lora": True,
        **changes,
    }
    with pytest.raises(ArgumentsError) as caught:
        peft_mlm.train(arguments)
    assert fault in str(caught.value)


def test_a_file_of_another_script_and_flags_over_it_are_understood(tmp_path: Path) -> None:
    from peft_mlm.config import read_arguments

    needed = {"model_name_or_path": "b", "train_file": "a.txt", "output_dir": "o", "use_peft": True}
    theirs = {
        **needed, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "bf16": True,
    }  # fmt: skip
    (tmp_path / "qlora.yaml").write_text(yaml.safe_dump(theirs))
    model = read_arguments(tmp_path / "qlora.yaml").model
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.bnb_4bit_compute_dtype) == (True, "nf4", "bfloat16")
    eight = read_arguments(tmp_path / "qlora.yaml", ["--load_in_8bit"])
    assert (eight.model.load_in_8bit, eight.model.load_in_4bit) == (True, False)
    assert any("sets aside load_in_4bit" in notice for notice in eight.notices)
    none = read_arguments(tmp_path / "qlora.yaml", ["--load_in_4bit", "false"])
    assert (none.model.load_in_4bit, none.model.bnb_4bit_use_double_quant) == (False, False)


def test_a_run_on_a_checkpoint_quantised_already_reloads_and_merges(
    wide_base: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = tmp_path / "stored"
    AutoModelForMaskedLM.from_pretrained(wide_base, quantization_config=config).save_pretrained(stored)
    letter_tokenizer().save_pretrained(stored)
    run = train(stored, text_file, held_out, tmp_path / "run", max_steps=4, eval_steps=4)
    assert not (run / "adapter" / "base_recipe.json").exists()
    assert "BitsAndBytesConfig" not in (run / "adapter" / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["quantisation"]["quantised_head"] == ["cls.predictions.transform.dense"]
    report = peft_mlm.merge(str(run), tmp_path / "merged")
    assert report["max_abs_logit_diff"] < 1e-6
    assert report["max_abs_logit_diff_quantised"] < 1e-5
    with pytest.raises(AdapterError, match="quantised base, whose weights cannot be trained"):
        train(stored, text_file, held_out, tmp_path / "full", use_lora=False)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("case", ["longer tokenizer", "no head"])
def test_new_rows_and_a_fresh_head_are_trained_beside_quantised_layers(
    bits: str, case: str, encoder: Path, base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    letter_tokenizer(["AB", "CD"]).save_pretrained(tmp_path / "tokenizer")
    base = encoder if case == "no head" else base_folder
    changes = {} if case == "no head" else {"tokenizer_name": tmp_path / "tokenizer"}
    run = train(base, text_file, held_out, tmp_path / "run", max_steps=6, eval_steps=6, **{bits: True}, **changes)
    loaded = peft_mlm.load(str(run))
    encoder_layers = {id(module) for module in loaded.base.model.base_model.modules()}
    assert all(id(layer) in encoder_layers for layer in quantised_layers(loaded.base.model).values())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["adapted"]["loss"] < summary["base"]["loss"]
    assert peft_mlm.evaluate(str(run))["loss"] == pytest.approx(summary["adapted"]["loss"], rel=1e-6)
    assert peft_mlm.merge(str(run), tmp_path / "merged")["max_abs_logit_diff"] < 1e-6


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    bits: str, base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    whole = train(base_folder, text_file, held_out, tmp_path / "whole", max_steps=8, eval_steps=4, **{bits: True})
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-8")
    words = ["--output_dir", str(stopped), "--resume_from_checkpoint", "true"]
    peft_mlm.train(stopped / "arguments.yaml", flags=words)
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_half_precision_runs_train_their_head_in_float32(
    bits: str, base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"bf16": True, "use_cpu": True, "dtype": "bfloat16", "modules_to_save": ["lm_head"]}
    run = train(
        base_folder, text_file, held_out, tmp_path / "run", max_steps=6, eval_steps=6, **{bits: True}, **changes
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["adapted"]["loss"] < summary["base"]["loss"]
    # batches are padded otherwise, which bfloat16 sums see
    assert peft_mlm.evaluate(str(run))["loss"] == pytest.approx(summary["adapted"]["loss"], rel=1e-4)
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert peft_mlm.merge(str(run), tmp_path / "merged")["max_abs_logit_diff"] < 1e-6
