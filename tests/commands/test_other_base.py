"""An adapter and a base of the same shapes that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm.errors import AdapterError
from tests.tiny import save_base


def test_plain_peft_puts_an_adapter_on_a_foreign_base_and_we_do_not(trained_run: Path, tmp_path: Path):
    foreign = save_base(tmp_path / "foreign", seed=5)
    PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(foreign), str(trained_run / "adapter"))
    with pytest.raises(AdapterError, match=r"is not the base that the adapter .* was trained on: weights of \d+ of"):
        peft_mlm.load(str(trained_run), base=str(foreign))
    allowed = peft_mlm.load(str(trained_run), base=str(foreign), any_base=True)
    assert allowed.base.name_or_path == str(foreign)


def test_a_base_moved_and_cast_to_bfloat16_is_still_the_base(trained_run: Path, base_folder: Path, tmp_path: Path):
    AutoModelForMaskedLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "moved")
    for file in base_folder.glob("token*.json"):
        (tmp_path / "moved" / file.name).write_text(file.read_text())
    assert peft_mlm.load(str(trained_run / "adapter"), base=str(tmp_path / "moved")).base.fresh_parameters == ()


@pytest.mark.parametrize("words", [["evaluate"], ["fill-mask"], ["merge"]], ids=lambda words: words[0])
def test_each_command_refuses_a_foreign_base_in_one_sentence_and_takes_it_when_told(
    words, command, trained_run: Path, tmp_path: Path
):
    foreign, output = save_base(tmp_path / "foreign", seed=5), tmp_path / "merged"
    rest = {"evaluate": [], "fill-mask": ["AB<mask>"], "merge": ["--output_dir", str(output)]}[words[0]]
    words = [*words, str(trained_run), *rest, "--base", str(foreign), "--json"]
    fault = command(*words).fault
    assert "is not the base that the adapter" in fault
    assert "--any_base" in fault
    assert not output.exists()
    assert json.loads(command(*words, "--any_base").out)
