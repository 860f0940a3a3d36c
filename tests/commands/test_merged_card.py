"""The card and the checksums of a merged model: true, readable by the hub, and good for a push."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import peft_mlm
from tests.commands.conftest import Answer

IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])


@pytest.fixture
def merged(trained_run: Path, tmp_path: Path) -> Path:
    peft_mlm.merge(str(trained_run), tmp_path / "merged")
    return tmp_path / "merged"


def test_its_figures_are_those_of_the_run_and_the_merge(merged: Path, trained_run: Path) -> None:
    card = (merged / "README.md").read_text()
    summary = json.loads((trained_run / "summary.json").read_text())
    report = json.loads((merged / "merge_report.json").read_text())
    for part in ("base", "adapted"):
        assert f"| {summary[part]['perplexity']:.4g} | {summary[part]['accuracy']:.4f} |" in card
    total = sum(p.numel() for p in peft_mlm.load(str(merged)).model.parameters())
    assert f"{summary['trainable_parameters']:,} trained parameters" in card
    assert f"of {total:,})" in card
    assert f"difference of a logit is {report['max_abs_logit_diff']:.1e}" in card
    assert "LoRA, rank 8, alpha 16, merged into the base" in card
    assert "letters.txt" in card
    for private in (str(merged.parent), str(trained_run), str(Path.home())):
        assert private not in card


def test_the_hub_reads_its_metadata_and_its_code_runs(merged: Path, trained_run: Path) -> None:
    card = (merged / "README.md").read_text()
    read = ModelCard(card)
    assert read.data.to_dict() == yaml.safe_load(card.split("---\n")[1])
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "fill-mask")
    assert read.data.tags == ["masked-lm", "peft-mlm"]
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(merged)), names)
    with torch.no_grad():
        given = names["fill"].model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        adapted = peft_mlm.load(str(trained_run)).model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert (given - adapted).abs().max() < 1e-5


def test_it_is_sound_described_and_ready_for_a_push(merged: Path, command: Callable[..., Answer]) -> None:
    assert command("verify", merged, "--json").record["ok"] is True
    record = command("inspect", merged, "--json").record
    assert (record["kind"], record["method"], record["warnings"]) == ("model", "merged", [])
    assert record["merge"]["tied"] is True
    files = command("push", merged, "org/merged", "--dry_run", "--json").record
    assert files["left_out"] == []
    assert {"README.md", "checksums.json", "config.json", "model.safetensors"} <= set(files["files"])


def test_of_an_adapter_of_plain_peft_nothing_is_invented(trained_run: Path, base_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (alone / name).write_bytes((trained_run / "adapter" / name).read_bytes())
    peft_mlm.merge(str(alone), tmp_path / "merged", base=str(base_folder))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Data:" not in card
    assert "perplexity" not in card
    assert "None" not in card
