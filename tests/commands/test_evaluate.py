from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from peft_mlm.collator import from_tokenizer
from peft_mlm.console import with_error
from peft_mlm.errors import ModelError
from peft_mlm.run_folder import RunFolder
from tests.commands.conftest import Answer, train
from tests.tiny import letter_texts, letter_tokenizer, tiny_model

FIGURES = (
    "loss", "loss_standard_error", "perplexity", "accuracy", "accuracy_standard_error", "top5_accuracy",
    "masked_tokens",
)  # fmt: skip
KEYS = {"model", "part", *FIGURES, "rows", "data"}


def summary(run: Path) -> dict[str, Any]:
    record = json.loads(RunFolder(run).summary.read_text())
    assert isinstance(record, dict)
    return record


def figures(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in FIGURES}


def plain_figures(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """The definition, row by row in float64: no batches, no padding, and of our code the masks alone."""
    model, masks = model.eval().double(), from_tokenizer(tokenizer, seed=0, fixed=True)
    losses: list[list[float]] = []
    hits: list[list[bool]] = []
    among: list[bool] = []
    for text in texts:
        losses.append([])
        hits.append([])
        batch = masks([{"input_ids": tokenizer(text, truncation=True, max_length=62)["input_ids"]}])
        with torch.no_grad():
            log_p = model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                losses[-1].append(-log_p[place, label].item())
                hits[-1].append(log_p[place].argmax().item() == label)
                among.append(label in log_p[place].topk(5).indices.tolist())
    loss, loss_error = ratio_and_error(losses)
    accuracy, accuracy_error = ratio_and_error(hits)
    return {
        "loss": loss,
        "loss_standard_error": loss_error,
        "perplexity": math.exp(loss),
        "accuracy": accuracy,
        "accuracy_standard_error": accuracy_error,
        "top5_accuracy": sum(among) / len(among),
        "masked_tokens": len(among),
    }


def ratio_and_error(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over all tokens, and its standard error over rows, by a plain loop."""
    rows = [row for row in rows if row]
    mean = math.fsum(map(math.fsum, rows)) / sum(map(len, rows))
    squares = math.fsum((math.fsum(row) - mean * len(row)) ** 2 for row in rows)
    return mean, math.sqrt(len(rows) / (len(rows) - 1) * squares) / sum(map(len, rows))


def texts_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


@pytest.fixture
def moved(trained_run: Path, tmp_path: Path) -> Path:
    """The run's adapter, alone in another place."""
    return Path(shutil.copytree(trained_run / "adapter", tmp_path / "elsewhere" / "adapter"))


@pytest.fixture(scope="session")
def merged(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    peft_mlm.merge(str(trained_run), folder)
    return folder


def test_it_gives_the_figures_of_a_plain_loop(trained_run: Path, base_folder: Path, held_out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    expected = plain_figures(base, tokenizer, texts_of(held_out))
    given = figures(peft_mlm.evaluate(str(trained_run), use_base=True))
    assert given == pytest.approx(expected, rel=1e-6)
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    adapted = PeftModel.from_pretrained(base, str(trained_run / "adapter"))
    expected = plain_figures(adapted, tokenizer, texts_of(held_out))
    given = figures(peft_mlm.evaluate(str(trained_run)))
    assert given == pytest.approx(expected, rel=1e-6)


def test_a_run_and_what_lies_in_it_give_the_figures_that_training_gave(trained_run: Path) -> None:
    told = summary(trained_run)
    assert told["adapted"]["loss"] < told["base"]["loss"]
    for place, part in (
        (trained_run, "adapted"),
        (trained_run / "adapter", "adapted"),
        (trained_run / "checkpoints" / "checkpoint-30", "adapted"),
    ):
        record = peft_mlm.evaluate(str(place))
        assert figures(record) == told["adapted"], place
        assert (record["part"], record["rows"]) == (part, 60)
        record = peft_mlm.evaluate(str(place), use_base=True)
        assert figures(record) == told["base"], place
        assert record["part"] == "base"
    logs = [json.loads(line) for line in RunFolder(trained_run).metrics.read_text().splitlines()]
    (halfway,) = [log for log in logs if log["step"] == 15 and "eval_loss" in log]
    assert peft_mlm.evaluate(str(trained_run / "checkpoints" / "checkpoint-15"))["loss"] == halfway["eval_loss"]


def test_a_fully_trained_run_its_model_and_checkpoints_give_the_figures_that_training_gave(full_run: Path) -> None:
    told = summary(full_run)
    assert told["adapted"]["loss"] < told["base"]["loss"]
    for place in (full_run, full_run / "model", full_run / "checkpoints" / "checkpoint-30"):
        assert figures(peft_mlm.evaluate(str(place))) == told["adapted"], place
        assert figures(peft_mlm.evaluate(str(place), use_base=True)) == told["base"], place


def test_a_moved_adapter_and_a_merged_model_give_the_same_figures_with_the_arguments_of_the_run(
    trained_run: Path, base_folder: Path, merged: Path, moved: Path, command: Callable[..., Answer]
) -> None:
    told = summary(trained_run)["adapted"]
    arguments = RunFolder(trained_run).arguments
    record = command("evaluate", moved, arguments, "--base", base_folder, "--json").record
    assert figures(record) == told
    assert record["part"] == "adapted"
    record = command("evaluate", merged, arguments, "--json").record
    assert figures(record) == pytest.approx(told, rel=1e-5)
    assert record["part"] == "model"


def test_a_merged_model_in_the_run_folder_needs_no_arguments(trained_run: Path, merged: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.copytree(merged, run / "merged")
    assert figures(peft_mlm.evaluate(str(run / "merged"))) == pytest.approx(summary(run)["adapted"], rel=1e-5)
    assert figures(peft_mlm.evaluate(str(run / "merged"), use_base=True)) == summary(run)["base"]


def test_a_plain_model_is_evaluated_on_the_file_that_is_named(
    base_folder: Path, held_out: Path, command: Callable[..., Answer]
) -> None:
    answer = command("evaluate", base_folder, "--validation_file", held_out, "--rows", "line", "--json")
    record = answer.record
    assert set(record) == KEYS
    assert record["part"] == "model"
    assert record["model"] == str(base_folder)
    assert record["data"]["source"] == {"files": [str(held_out)]}
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    assert figures(record) == pytest.approx(plain_figures(model, tokenizer, texts_of(held_out)), rel=1e-6)


def test_flags_override_the_text_of_the_run(
    trained_run: Path, base_folder: Path, text_file: Path, command: Callable[..., Answer]
) -> None:
    record = command("evaluate", trained_run, "--validation_file", text_file, "--json").record
    adapted = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base_folder), str(trained_run / "adapter"))
    expected = plain_figures(adapted, AutoTokenizer.from_pretrained(base_folder), texts_of(text_file))
    assert figures(record) == pytest.approx(expected, rel=1e-6)
    assert record["data"]["source"] == {"files": [str(text_file)]}
    few = command("evaluate", trained_run, "--max_eval_samples", 7, "--json").record
    assert few["rows"] == 7
    told = summary(trained_run)["adapted"]
    rough = command("evaluate", trained_run, "--dtype", "bfloat16", "--json").record
    assert rough["loss"] != pytest.approx(told["loss"], rel=1e-5)
    assert rough["loss"] == pytest.approx(told["loss"], rel=1e-2)


def test_the_figures_do_not_depend_on_batch_size_or_order(trained_run: Path, held_out: Path, tmp_path: Path) -> None:
    told = summary(trained_run)["adapted"]
    for size in (1, 7, 64):
        record = peft_mlm.evaluate(str(trained_run), flags=["--per_device_eval_batch_size", str(size)])
        assert figures(record) == pytest.approx(told, rel=1e-6), size
    texts = texts_of(held_out)
    random.Random(3).shuffle(texts)
    (tmp_path / "shuffled.txt").write_text("\n".join(texts))
    record = peft_mlm.evaluate(str(trained_run), flags=["--validation_file", str(tmp_path / "shuffled.txt")])
    assert figures(record) == pytest.approx(told, rel=1e-6)


def test_another_mask_seed_gives_other_masks(trained_run: Path) -> None:
    told = summary(trained_run)["adapted"]
    assert peft_mlm.evaluate(str(trained_run), flags=["--eval_mask_seed", "1"])["loss"] != told["loss"]


def test_the_base_of_a_run_with_a_longer_tokenizer_is_the_one_that_training_measured(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    letter_tokenizer(extra=["[odd]"]).save_pretrained(tmp_path / "longer")
    run = train(base_folder, text_file, held_out, tmp_path / "run", tokenizer_name=tmp_path / "longer", max_steps=2)
    assert figures(peft_mlm.evaluate(str(run), use_base=True)) == summary(run)["base"]
    assert figures(peft_mlm.evaluate(str(run))) == summary(run)["adapted"]


def test_a_base_without_a_head_is_refused_and_its_adapter_is_not(
    encoder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = train(encoder, text_file, held_out, tmp_path / "run", max_steps=2)
    assert figures(peft_mlm.evaluate(str(run))) == summary(run)["adapted"]
    for name, options in ((run, {"use_base": True}), (encoder, {"config": RunFolder(run).arguments})):
        with pytest.raises(ModelError, match="no masked LM head of its own"):
            peft_mlm.evaluate(str(name), **options)


def test_a_model_made_from_scratch_has_no_base(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
    scratch = {"model_name_or_path": None, "model_type": "bert", "config_overrides": sizes, "use_lora": False}
    run = train(base_folder, text_file, held_out, tmp_path / "run", **scratch, tokenizer_name=base_folder, max_steps=2)
    assert figures(peft_mlm.evaluate(str(run))) == summary(run)["adapted"]
    with pytest.raises(ModelError, match="from scratch"):
        peft_mlm.evaluate(str(run), use_base=True)


def test_an_infinite_perplexity_is_null_in_json(tmp_path: Path, command: Callable[..., Answer]) -> None:
    model: Any = tiny_model("bert")
    with torch.no_grad():
        model.cls.predictions.decoder.bias[4] = 1e5
    model.save_pretrained(tmp_path / "sure")
    letter_tokenizer().save_pretrained(tmp_path / "sure")
    (tmp_path / "t.txt").write_text("\n".join(letter_texts(20)))
    record = command("evaluate", tmp_path / "sure", "--validation_file", tmp_path / "t.txt", "--json").record
    assert record["loss"] == pytest.approx(1e5, rel=1e-3)
    assert record["perplexity"] is None
    assert record["accuracy"] == 0


@pytest.mark.usefixtures("untouched")
def test_the_table_shows_the_figures_and_nothing_is_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Answer]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = summary(trained_run)
    for words, part in (([], "adapted"), (["--use_base"], "base"), (["--use_base", "false"], "adapted")):
        answer = command("evaluate", trained_run, *words)
        assert answer.code == 0
        loss = with_error(told[part]["loss"], told[part]["loss_standard_error"])
        assert " ± " in loss
        for shown in (part, loss, f"{told[part]['perplexity']:.4g}", f"{told[part]['top5_accuracy']:.4g}"):
            assert shown in answer.out
        assert answer.err == ""


def bad_words(case: str, tmp_path: Path) -> list[object]:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{}")
    (tmp_path / "damaged" / "adapter_model.safetensors").touch()
    (tmp_path / "empty.txt").touch()
    text = ["--validation_file", "HELD_OUT"]
    words: dict[str, list[object]] = {
        "nothing": [],
        "flag first": ["--use_base", "RUN"],
        "three names": ["RUN", "a.yaml", "b.yaml"],
        "no text": ["BASE"],
        "still no text": ["BASE", "--per_device_eval_batch_size", 4],
        "no such file": ["BASE", "--validation_file", tmp_path / "no.txt"],
        "empty file": ["BASE", "--validation_file", tmp_path / "empty.txt"],
        "no such config": ["RUN", tmp_path / "no.yaml"],
        "unknown flag": ["RUN", "--per_device_eval_batchsize", 4],
        "wrong value": ["RUN", "--per_device_eval_batch_size", "many"],
        "base without a value": ["RUN", "--base"],
        "use_base with a value": ["RUN", "--use_base", "perhaps"],
        "base of a model": ["BASE", *text, "--use_base"],
        "model with a base": ["BASE", *text, "--base", "BASE"],
        "model by a flag": ["RUN", "--model_name_or_path", "BASE"],
        "adapter by flags": ["RUN", "--use_lora", "--lora_r", 4],
        "no such folder": [tmp_path / "nothing", *text],
        "a folder without a model": [tmp_path, *text],
        "a damaged adapter": [tmp_path / "damaged", *text],
        "a base of another kind": ["RUN", "--base", "OTHER_KIND"],
        "no such base": ["RUN", "--base", tmp_path / "nothing"],
    }
    return words[case]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", "Give a model"),
        ("flag first", "Give a model"),
        ("three names", "Give a model"),
        ("no text", "--validation_file"),
        ("still no text", "validation_file"),
        ("no such file", "no.txt"),
        ("empty file", "empty.txt"),
        ("no such config", "no.yaml"),
        ("unknown flag", "per_device_eval_batch_size"),
        ("wrong value", "many"),
        ("base without a value", "--base"),
        ("use_base with a value", "perhaps"),
        ("base of a model", "Leave --use_base out"),
        ("model with a base", "Leave --base out"),
        ("model by a flag", "--model_name_or_path"),
        ("adapter by flags", "--use_lora, --lora_r"),
        ("no such folder", "no folder"),
        ("a folder without a model", "config.json"),
        ("a damaged adapter", "damaged"),
        ("a base of another kind", "does not fit"),
        ("no such base", "no folder"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    case: str,
    said: str,
    trained_run: Path,
    base_folder: Path,
    encoder: Path,
    held_out: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
) -> None:
    names = {"RUN": trained_run, "BASE": base_folder, "HELD_OUT": held_out, "OTHER_KIND": encoder}
    words = [names.get(str(word), word) for word in bad_words(case, tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    assert said in command("evaluate", *words).fault
    assert sorted(tmp_path.rglob("*")) == before
