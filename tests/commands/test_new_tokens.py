"""Runs with added tokens, through every command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from peft_mlm.errors import AdapterError
from peft_mlm.run_folder import RunFolder, read_json
from tests.commands.conftest import Answer, train
from tests.tiny import letter_texts, letter_tokenizer, same, save_base

IDS = torch.tensor([[0, 25, 9, 4, 26, 20, 2]])
FRESH_PROCESS = """
import os, sys, torch, peft_mlm
from peft import AutoPeftModel
from transformers import AutoTokenizer

for adapter, logits, base in zip(*[iter(sys.argv[1:])] * 3):
    os.chdir(os.path.dirname(base))  # where the base has the name that the adapter gives
    ids, expected = torch.load(logits)
    plain = AutoPeftModel.from_pretrained(adapter).merge_and_unload().eval()
    assert len(AutoTokenizer.from_pretrained(adapter)) == plain.config.vocab_size
    with torch.no_grad():
        for model in (peft_mlm.load(adapter, base=base).model, plain):
            print(float((model(input_ids=ids).logits - expected).abs().max() / expected.abs().max()))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = [text[:6] + "[odd]" + text[6:12] + "[even]" + text[12:16] for text in letter_texts(200)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def run(base_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tokens.txt").write_text("[odd]\n[even]\n")
    return train(base_folder, texts, texts, folder / "run", add_tokens=folder / "tokens.txt", max_steps=20)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        given = model(input_ids=ids).logits
    assert isinstance(given, torch.Tensor)
    return given


def figures(record: dict[str, Any]) -> list[Any]:
    return [record[name] for name in ("loss", "accuracy", "masked_tokens")]


def summary(run: Path) -> dict[str, Any]:
    return dict(read_json(RunFolder(run).summary))


def test_every_command_finds_the_tokens_of_a_run_again(run: Path, tmp_path: Path) -> None:
    (run.parent / "tokens.txt").unlink()  # a run does not need the file again
    assert yaml.safe_load(RunFolder(run).arguments.read_text())["add_tokens"] == ["[odd]", "[even]"]
    assert summary(run)["adapted"]["loss"] < summary(run)["base"]["loss"]
    trained = logits(peft_mlm.load(str(run)).model)
    for place in (run / "adapter", run / "checkpoints" / "checkpoint-20"):
        loaded = peft_mlm.load(str(place))
        assert same(logits(loaded.model), trained)
        assert len(loaded.tokenizer) == 27
    assert figures(peft_mlm.evaluate(str(run))) == figures(summary(run)["adapted"])
    for place in (run, run / "adapter"):
        assert figures(peft_mlm.evaluate(str(place), use_base=True)) == figures(summary(run)["base"])
    filled = peft_mlm.fill_mask(str(run), ["AB[odd]<mask>"], top_k=27)
    assert "[even]" in str(filled)
    merged = peft_mlm.merge(str(run), tmp_path / "merged")
    assert merged["max_abs_logit_diff"] < 1e-5
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 27
    assert (logits(plain) - trained).abs().max() < 1e-5


def test_resuming_gives_the_same_rows(run: Path, base_folder: Path, texts: Path, tmp_path: Path) -> None:
    tokens = ["[odd]", "[even]"]
    cut = train(base_folder, texts, texts, tmp_path / "cut", add_tokens=tokens, max_steps=20, save_steps=10)
    for file in (RunFolder(cut).adapter.iterdir(), (RunFolder(cut).checkpoints / "checkpoint-20").iterdir()):
        for path in file:
            path.unlink()
    (RunFolder(cut).checkpoints / "checkpoint-20").rmdir()
    RunFolder(cut).adapter.rmdir()
    peft_mlm.train(RunFolder(cut).arguments, flags=["--resume_from_checkpoint", "true"])
    one, other = (load_file(RunFolder(r).adapter / "adapter_model.safetensors") for r in (run, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_going_on_with_further_tokens(run: Path, base_folder: Path, texts: Path, tmp_path: Path) -> None:
    options = {"use_lora": False, "adapter_name_or_path": run / "adapter", "max_steps": 4, "eval_steps": 2}
    options |= {"load_best_model_at_end": True}
    wider = train(base_folder, texts, texts, tmp_path / "wider", add_tokens=["<third>"], **options)
    loaded = peft_mlm.load(str(wider))
    assert loaded.tokenizer.convert_tokens_to_ids(["[odd]", "[even]", "<third>"]) == [25, 26, 27]
    assert logits(loaded.model).shape[-1] == 28
    assert figures(peft_mlm.evaluate(str(wider))) == figures(summary(wider)["adapted"])
    assert figures(peft_mlm.evaluate(str(wider / "adapter"))) == figures(summary(wider)["adapted"])


def test_a_tokenizer_that_is_not_the_adapters_own_is_refused_when_going_on(
    run: Path, base_folder: Path, texts: Path, tmp_path: Path
) -> None:
    letter_tokenizer(extra=["[other]", "[even]"]).save_pretrained(tmp_path / "other")
    options = {"use_lora": False, "adapter_name_or_path": run / "adapter", "tokenizer_name": tmp_path / "other"}
    with pytest.raises(AdapterError, match=r"id 25 is '\[odd\]'; in the one given it is '\[other\]'"):
        train(base_folder, texts, texts, tmp_path / "run", **options)


@pytest.mark.parametrize("scratch", [False, True])
def test_a_whole_model_is_saved_with_its_longer_tokenizer(
    scratch: bool, base_folder: Path, texts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"use_lora": False, "max_steps": 2, "add_special_tokens": ["[odd]", "[even]"]}
    if scratch:
        sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
        options |= {"model_name_or_path": None, "model_type": "bert", "config_overrides": sizes}
        options |= {"tokenizer_name": base_folder}
    folder = train(base_folder, texts, texts, tmp_path / "run", **options)
    model = AutoModelForMaskedLM.from_pretrained(RunFolder(folder).model).eval()
    tokenizer = AutoTokenizer.from_pretrained(RunFolder(folder).model)
    assert model.config.vocab_size == len(tokenizer) == 27
    assert {25, 26} <= set(tokenizer.all_special_ids)
    assert same(logits(peft_mlm.load(str(folder)).model), logits(model))
    assert figures(peft_mlm.evaluate(str(folder))) == figures(summary(folder)["adapted"])
    if not scratch:
        assert figures(peft_mlm.evaluate(str(folder), use_base=True)) == figures(summary(folder)["base"])


def test_real_checkpoints_ship_rows_in_kilobytes_and_load_in_a_fresh_process(
    antiberty: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-3, "max_steps": 2, "eval_steps": 1, "lora_target_modules": ["query"], "lora_r": 1}
    residues, sentence = "E V Q L V E S G G pY L S Kac", "took Pembrolizumab and nivolumab for pain [DRUG]"
    words: list[str | Path] = []
    for base, text, tokens, special in (
        (antiberty, residues, ["pY", "Kac"], None),
        (minilm_folder, sentence, ["Pembrolizumab", "nivolumab"], ["[DRUG]"]),
    ):
        folder = tmp_path / base.name
        folder.mkdir()
        (folder / "t.txt").write_text("\n".join(f"{text} {text[i:]}" for i in range(12)))
        lists = {"add_tokens": tokens, "add_special_tokens": special}
        run = RunFolder(train(base, folder / "t.txt", folder / "t.txt", folder / "run", **lists, **options))
        loaded = peft_mlm.load(str(run.path))
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        new = loaded.base.new_token_ids
        assert set(new) <= set(ids[0].tolist())
        shipped = load_file(run.adapter / "adapter_model.safetensors")
        rows = [tensor for name, tensor in shipped.items() if "trainable_tokens" in name]
        assert [len(tensor) for tensor in rows] == [len(new)]
        assert max(len(tensor) for tensor in shipped.values()) < 1000  # PEFT's own way stores a row for each token
        torch.save((ids, logits(loaded.model, ids)), folder / "logits.pt")
        words += [run.adapter, folder / "logits.pt", base]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(peft_mlm.__file__).parent.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ours_1, plain_1, ours_2, plain_2 = (float(line) for line in done.stdout.splitlines())
    assert (ours_1, ours_2) == (0, 0)
    assert max(plain_1, plain_2) < 2e-6  # merged: summed in another order


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--add_tokens", "nowhere.txt"], "add_tokens: nowhere.txt cannot be read: there is no such file"),
        (["--add_special_tokens", "./tokens"], "add_special_tokens: ./tokens cannot be read"),
        (["--add_tokens", "[x]", "--add_special_tokens", "[x]"], "given as an ordinary and as a special token"),
        (["--new_token_init", "random"], "new_token_init"),
        (["--new_token_init", "pieces"], "new_token_init is pieces, but no token is new"),
        (["--add_tokens_inside_words"], "add_tokens_inside_words is given without add_tokens"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    options: list[str], said: str, command: Callable[..., Answer], base_folder: Path, texts: Path, tmp_path: Path
) -> None:
    answer = command(
        "train", "--model_name_or_path", base_folder, "--train_file", texts, "--use_lora", "--output_dir",
        tmp_path / "run", *options,
    )  # fmt: skip
    assert said in answer.fault
    assert not (tmp_path / "run").exists()


def test_what_is_added_is_told(command: Callable[..., Answer], texts: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert", vocab_size=26)
    answer = command(
        "train", "--model_name_or_path", base, "--train_file", texts, "--use_lora", "--output_dir", tmp_path / "run",
        "--max_steps", 1, "--add_tokens", "[odd],A,[even]",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "A: in the vocabulary already, nothing to add." in answer.err
    assert "2 tokens that the base's own does not have: 1 rows were added, 1 spare rows are used." in answer.err
