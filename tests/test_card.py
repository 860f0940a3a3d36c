from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import peft_mlm
from peft_mlm.card import render_card
from peft_mlm.cli import COMMANDS
from peft_mlm.run_folder import RunFolder
from tests.tiny import letter_tokenizer, save_base, save_encoder

IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
FACTS: dict[str, Any] = {
    "kind": "adapter",
    "base_model": "org/base",
    "base_on_hub": True,
    "base_revision": None,
    "method": "LoRA, rank 8, alpha 16",
    "peft_type": "lora",
    "trained_modules": (),
    "new_tokens": 0,
    "renamed": False,
    "untied": False,
    "growth_code": (),
    "quantisation": None,
    "base_recipe": {},
    "trainable_parameters": 1234,
    "total_parameters": 100_000,
    "data": "letters.txt",
    "rows": 5678,
    "steps": 90,
    "max_seq_length": 62,
    "mlm_probability": 0.15,
    "base": {"perplexity": 12.3456, "accuracy": 0.5, "masked_tokens": 4321},
    "adapted": {"perplexity": 2.5, "accuracy": 0.87654, "masked_tokens": 4321},
    "versions": {"torch": "9.8.7", "bitsandbytes": None},
}
TAGS = ["masked-lm", "peft-mlm", "lora"]
RUNS = ("adapter", "fresh head", "new tokens", "whole model")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with bases, and a run of each kind."""
    folder = tmp_path_factory.mktemp("card")
    bases = {name: folder / name.replace(" ", "_") for name in RUNS}
    save_encoder(bases["fresh head"])
    for name in set(RUNS) - {"fresh head"}:
        save_base(bases[name], "bert" if name == "new tokens" else "roberta")
    letter_tokenizer(extra=["[odd]", "[even]"]).save_pretrained(folder / "longer")
    for name in RUNS:
        peft_mlm.train(
            {
                "model_name_or_path": bases[name],
                "tokenizer_name": folder / "longer" if name == "new tokens" else None,
                "train_file": text_file,
                "output_dir": folder / "runs" / name,
                "use_lora": name != "whole model",
                "max_steps": 8,
                "learning_rate": 1e-2,
                "token": "hf_secret",
            }
        )
    return folder


def shipped(work: Path, name: str) -> Path:
    run = RunFolder(work / "runs" / name)
    return run.model if name == "whole model" else run.adapter


def card_of(work: Path, name: str) -> str:
    return (shipped(work, name) / "README.md").read_text(encoding="utf-8")


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


@pytest.mark.parametrize("name", RUNS)
def test_the_code_in_the_card_runs_and_gives_the_trained_model(
    name: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)  # the base lies here under the name that the card gives
    names: dict[str, Any] = {}
    torch.manual_seed(int.from_bytes(name.encode(), "big") % 1000)
    exec(code_of(card_of(work, name)).replace("THIS_FOLDER", str(shipped(work, name))), names)
    model = names["fill"].model if name == "whole model" else names["model"]
    with torch.no_grad():
        given = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        loaded = peft_mlm.load(str(work / "runs" / name)).model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    # New tokens: the card merges, and a sum in another order rounds otherwise.
    assert (given - loaded.logits).abs().max() <= (1e-5 if name == "new tokens" else 0)


def test_the_commands_in_the_card_run(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = {}
    for line in re.findall(r"`peft-mlm (.*?)`", card_of(work, "adapter")):
        name, *words = shlex.split(line.replace("THIS_FOLDER", str(shipped(work, "adapter"))).replace("...", "A<mask>"))
        records[name] = importlib.import_module(f"peft_mlm.commands.{COMMANDS[name][0]}").run(words)
    assert set(records) == {"fill-mask", "merge"}
    assert len(records["fill-mask"]["results"]) == 1
    assert records["merge"]["output_dir"] == "merged"
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_those_of_the_run_and_nothing_of_this_machine_is_in_it(name: str, work: Path) -> None:
    card, run = card_of(work, name), RunFolder(work / "runs" / name)
    summary = json.loads(run.summary.read_text())
    facts = json.loads(run.dataset.read_text())
    for part in ("base", "adapted"):
        assert f"| {summary[part]['perplexity']:.4g} | {summary[part]['accuracy']:.4f} |" in card
    for count in (
        f"{summary['adapted']['masked_tokens']:,} masked tokens",
        f"{summary['trainable_parameters']:,} trained parameters",
        f"of {summary['total_parameters']:,})",
        f"{facts['train']['rows_used']:,} rows of at most {facts['train']['max_seq_length']} tokens",
        "8 steps",
        "letters.txt",
    ):
        assert count in card
    for private in (str(work), str(work.parent), "hf_secret", str(Path.home())):
        assert private not in card


def test_the_fresh_head_and_the_added_tokens_are_told(work: Path) -> None:
    assert "Trained in full and shipped: cls.predictions.transform" in card_of(work, "fresh head")
    assert "adds tokens (2)" in card_of(work, "new tokens")
    for name in ("adapter", "whole model"):
        assert "shipped:" not in card_of(work, name)
        assert "adds tokens" not in card_of(work, name)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"library_name": "peft", "base_model": "org/base", "tags": ["masked-lm", "peft-mlm", "lora"]}),
        ({"kind": "model"}, {"library_name": "transformers", "base_model": "org/base"}),
        ({"base_model": "base", "base_on_hub": False}, {"library_name": "peft", "base_model": None}),
        ({"kind": "model", "base_model": None, "base_on_hub": False}, {"tags": ["masked-lm", "peft-mlm"]}),
        ({"new_tokens": 2}, {"library_name": "peft"}),
        ({"new_tokens": 2, "growth_code": ("base.resize_token_embeddings(9)", "torch.ones(1)")}, {"tags": TAGS}),
    ],
)
def test_the_metadata_are_yaml_that_the_hub_reads(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    card = render_card({**FACTS, **changes})
    _, front, body = card.split("---\n", 2)
    record = yaml.safe_load(front)
    assert set(record) <= {"library_name", "base_model", "pipeline_tag", "tags"}
    assert {name: record.get(name) for name in expected} == expected
    read = ModelCard(card)
    assert read.data.to_dict() == record
    assert read.data.pipeline_tag == "fill-mask"
    assert read.text.strip() == body.strip()
    assert body.lstrip().startswith("# ")
    assert body.count("```") == 2
    compile(code_of(card), "card", "exec")


def test_what_was_not_measured_is_left_out() -> None:
    card = render_card({**FACTS, "base": None, "adapted": None})
    assert "perplexity" not in card
    only_after = render_card({**FACTS, "base": None})
    assert "| base |" not in only_after
    assert "| this adapter | 2.5 | 0.8765 |" in only_after
    assert "torch 9.8.7" in card
    assert "bitsandbytes" not in card
    assert "Trained from scratch." in render_card({**FACTS, "kind": "model", "base_model": None, "base_on_hub": False})


def test_figures_without_a_number_are_shown_as_they_are() -> None:
    card = render_card({**FACTS, "adapted": {"perplexity": float("inf"), "accuracy": 0.0, "masked_tokens": 7}})
    assert "| this adapter | inf | 0.0000 |" in card


def test_the_lines_for_new_tokens_are_as_few_as_the_model_type_allows() -> None:
    """PEFT grows a base from the hub by itself, but not all that ESM needs; a local base is grown by a line."""
    grown = ("base.resize_token_embeddings(9)",)
    by_itself = code_of(render_card({**FACTS, "new_tokens": 2, "growth_code": grown}))
    assert "AutoPeftModel" in by_itself
    assert "resize" not in by_itself
    local = code_of(render_card({**FACTS, "new_tokens": 2, "growth_code": grown, "base_on_hub": False}))
    assert "\n".join(["", *grown, ""]) in local
    more = (*grown, "base.lm_head.bias = torch.nn.Parameter(torch.ones(9))")
    esm = code_of(render_card({**FACTS, "new_tokens": 2, "growth_code": more}))
    assert "\n".join(["", *more, ""]) in esm
    assert esm.startswith("import torch\n")


def test_figures_that_are_no_numbers_are_left_open() -> None:
    """A record holds null where no token was masked, or a perplexity is beyond a float."""
    none = {"perplexity": None, "accuracy": None, "masked_tokens": 0}
    assert "| this adapter | - | - |" in render_card({**FACTS, "base": None, "adapted": none})
