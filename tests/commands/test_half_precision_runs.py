"""Runs whose base is held in bfloat16: they learn, are evaluated and merged as those in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM

import peft_mlm
from tests.commands.conftest import Answer, train
from tests.tiny import difference, logits_at

BFLOAT16_STEP = 2**-8  # how far neighbouring numbers of bfloat16 lie apart, as a share
IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])


@pytest.fixture(scope="module")
def runs(base_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The same run in float32, and with the base in bfloat16 and bf16 on."""
    folder, done = tmp_path_factory.mktemp("types"), {}
    for name, types in (("float32", {}), ("bfloat16", {"dtype": "bfloat16", "bf16": True})):
        arguments = {
            "model_name_or_path": base_folder, "train_file": text_file, "output_dir": folder / name, "use_cpu": True,
            "use_lora": True, "modules_to_save": ["lm_head"], "add_tokens": ["XYZ"], "rows": "line", "max_steps": 20,
            "eval_steps": 10, "logging_steps": 1, "learning_rate": 1e-2, **types,
        }  # fmt: skip
        done[name] = (folder / name, peft_mlm.train(arguments))
    return done


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_base_in_bfloat16_learns_along_the_curve_of_float32(runs: dict[str, tuple[Path, Any]]) -> None:
    exact, half = (losses(run) for run, _ in runs.values())
    assert len(exact) == len(half) == 20
    assert max(abs(a - b) / a for a, b in zip(exact, half, strict=True)) < 4 * BFLOAT16_STEP
    assert exact[0] - exact[-1] > 10 * max(abs(a - b) for a, b in zip(exact, half, strict=True))


def test_what_is_trained_is_float32_and_the_frozen_base_is_held_once_in_bfloat16(
    runs: dict[str, tuple[Path, Any]],
) -> None:
    model = runs["bfloat16"][1].model
    trained = {name: p for name, p in model.named_parameters() if ".default" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any("modules_to_save" in name for name in trained)
    assert any("trainable_tokens_delta" in name for name in trained)
    others = {p.dtype for name, p in model.named_parameters() if name not in trained}
    assert others == {torch.bfloat16}


def test_evaluation_and_reload_follow_the_run_and_the_merge_is_exact(
    runs: dict[str, tuple[Path, Any]], tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run, result = runs["bfloat16"]
    saved = yaml.safe_load((run / "arguments.yaml").read_text())
    assert (saved["dtype"], saved["bf16"]) == ("bfloat16", True)
    assert command("evaluate", run, "--json").record["loss"] == result.metrics["adapted"]["loss"]
    report = command("merge", run, "--output_dir", tmp_path / "merged", "--json").record
    assert report["max_abs_logit_diff"] < 1e-4
    merged = logits_at(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged"), IDS)
    scale = float(merged.abs().max())
    for half in (result.model, peft_mlm.load(str(run)).model):  # the one with autocast, the other without
        assert difference(merged, logits_at(half, IDS).float()) < 8 * BFLOAT16_STEP * scale


def test_a_paged_optimiser_on_the_cpu_is_refused_with_its_plain_form(
    base_folder: Path, text_file: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    words = ("train", "--model_name_or_path", base_folder, "--train_file", text_file, "--use_cpu", "--use_lora")
    fault = command(*words, "--output_dir", tmp_path / "run", "--optim", "paged_adamw_8bit").fault
    assert "Use adamw_8bit" in fault
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_run_holds_its_base_in_bfloat16_by_itself(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    run = train(base_folder, text_file, held_out, tmp_path / "gpu")
    saved = yaml.safe_load((run / "arguments.yaml").read_text())
    assert (saved["dtype"], saved["bf16"]) == ("bfloat16", True)
    assert torch.backends.cuda.matmul.allow_tf32
    exact = train(base_folder, text_file, held_out, tmp_path / "exact", dtype="float32")
    assert max(abs(a - b) / a for a, b in zip(losses(exact), losses(run), strict=True)) < 4 * BFLOAT16_STEP
