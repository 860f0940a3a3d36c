"""Whole runs: the walk-through's example by every way in, real checkpoints, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import peft_mlm
from peft_mlm.cli import main
from peft_mlm.errors import ModelError, PeftMlmError
from peft_mlm.run_folder import RunFolder
from tests.hub_server import Hub
from tests.tiny import letter_texts, letter_tokenizer, save_base

pytest_plugins = ["tests.hub_fixture"]

GLUE_CARD = """---
configs:
- config_name: cola
  data_files:
  - split: train
    path: cola/train.csv
  - split: validation
    path: cola/validation.csv
---
"""
WALK_THROUGH = {
    "model_name_or_path": "org/base",
    "dataset_name": "glue",
    "dataset_config_name": "cola",
    "max_seq_length": 48,
    "rows": "run_mlm",
    "evaluation_strategy": "steps",
    "eval_steps": 5,
    "logging_steps": 5,
    "max_steps": 10,
    "per_device_train_batch_size": 8,
    "learning_rate": "1e-2",
    "use_lora": True,
    "lora_target_modules": "query,value",
    "seed": 7,
    "use_cpu": True,
}
THREE_WAYS = """
import json, sys
import peft_mlm
from peft_mlm.cli import main
arguments = json.loads(sys.argv[1])
peft_mlm.train({**arguments, "output_dir": "by_dict"})
with open("arguments.json", "w") as file:
    json.dump({**arguments, "output_dir": "by_json"}, file)
assert main(["train", "arguments.json"]) == 0
with open("arguments.yaml", "w") as file:
    file.write("".join(f"{name}: {value}\\n" for name, value in {**arguments, "output_dir": "by_yaml"}.items()))
assert main(["train", "arguments.yaml"]) == 0
flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
assert main(["train", *flags, "--output_dir", "by_flags"]) == 0
assert main(["train", "by_dict/arguments.yaml", "--output_dir", "again"]) == 0
"""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    run = RunFolder(folder)
    summary = json.loads(run.summary.read_text())
    kept = {name: summary[name] for name in ("base", "adapted", "trainable_parameters", "steps", "status")}
    timing = ("runtime", "per_second", "memory_bytes")
    logs = [
        {key: value for key, value in json.loads(line).items() if not key.endswith(timing)}
        for line in run.metrics.read_text().splitlines()
    ]
    return kept, logs, load_file(run.adapter / "adapter_model.safetensors")


def csv(texts: list[str]) -> str:
    return "sentence,label,idx\n" + "".join(f"{text},1,{i}\n" for i, text in enumerate(texts))


def test_the_walk_through_gives_the_same_by_dict_json_yaml_flags_and_saved_arguments(hub: Hub, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_dropout_prob=0.1)
    hub.publish("models", "org/base", base)
    glue = {"README.md": GLUE_CARD, "cola/train.csv": csv(letter_texts(200))}
    hub.publish("datasets", "nyu-mll/glue", {**glue, "cola/validation.csv": csv(letter_texts(40, seed=1))})
    hub.move("datasets", "glue", "nyu-mll/glue")
    work = tmp_path / "work"
    work.mkdir()
    script = [sys.executable, "-c", THREE_WAYS, json.dumps(WALK_THROUGH)]
    done = subprocess.run(script, env=hub.env, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    summary, logs, weights = read_run(work / "by_dict")
    assert summary["status"] == "finished"
    assert [log["step"] for log in logs if "eval_loss" in log] == [5, 10]
    assert [log["step"] for log in logs if "loss" in log] == [5, 10]
    for other in ("by_json", "by_yaml", "by_flags", "again"):
        other_summary, other_logs, other_weights = read_run(work / other)
        assert other_summary == summary, other
        assert other_logs == logs, other
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights), other

    facts = json.loads((work / "by_dict" / "dataset.json").read_text())
    assert facts["train"]["text_column"] == "sentence"
    assert facts["train"]["dropped_tokens"] > 0
    assert facts["validation"]["origin"] == "given"
    config = json.loads((work / "by_dict" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert len(config["revision"]) == 40


def test_the_run_folder_tells_the_whole_story(base_folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = peft_mlm.train(
        {
            "model_name_or_path": base_folder,
            "train_file": text_file,
            "output_dir": tmp_path / "run",
            "use_lora": True,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "token": "hf_secret",
            "use_cpu": True,
        }
    )
    run = RunFolder(result.run_folder)
    summary = json.loads(run.summary.read_text())
    assert summary["status"] == "finished"
    assert summary["adapted"] == result.metrics["adapted"]
    assert summary["adapter_bytes"] == (run.adapter / "adapter_model.safetensors").stat().st_size
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]
    sources = json.loads(run.sources.read_text())
    assert sources["max_steps"] != "default"
    assert sources["seed"] == "default"
    facts = json.loads(run.dataset.read_text())
    for split in ("train", "validation"):
        assert {"rows", "tokens", "dropped_tokens", "truncated_tokens", "unknown_share", "fingerprint"} <= set(
            facts[split]
        )
    assert facts["train"]["tokens"] == facts["train"]["text_tokens"]  # chunked rows lose nothing
    assert json.loads(run.environment.read_text())["versions"]["peft"]
    assert yaml.safe_load(run.arguments.read_text())["max_steps"] == 3
    for file in result.run_folder.rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file
    for file in run.adapter.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_an_adapter_is_gone_on_with(base_folder: Path, text_file: Path, tmp_path: Path) -> None:
    common = {
        "model_name_or_path": str(base_folder),
        "train_file": str(text_file),
        "learning_rate": 1e-2,
        "max_steps": 5,
    }
    first = peft_mlm.train({**common, "use_lora": True, "lora_r": 4, "output_dir": str(tmp_path / "one")})
    more = {"adapter_name_or_path": str(tmp_path / "one" / "adapter"), "output_dir": str(tmp_path / "two")}
    second = peft_mlm.train({**common, **more})
    assert second.metrics["base"] == first.metrics["adapted"]
    assert second.metrics["adapted"]["loss"] < first.metrics["adapted"]["loss"]
    assert second.metrics["trainable_parameters"] == first.metrics["trainable_parameters"]


def test_a_longer_tokenizer_is_trained_shipped_and_found_again(base_folder: Path, tmp_path: Path) -> None:
    letter_tokenizer(extra=["[odd]", "[even]"]).save_pretrained(tmp_path / "longer")
    texts = [text[:6] + "[odd]" + text[6:12] + "[even]" for text in letter_texts(80)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    result = peft_mlm.train(
        {
            "model_name_or_path": str(base_folder),
            "tokenizer_name": str(tmp_path / "longer"),
            "train_file": str(tmp_path / "t.txt"),
            "use_lora": True,
            "rows": "line",
            "learning_rate": 1e-2,
            "max_steps": 10,
            "output_dir": str(tmp_path / "run"),
        }
    )
    ids = torch.tensor([[0, 25, 9, 4, 26, 20, 2]])
    trained = result.model(input_ids=ids).logits
    for place in ("run", "run/adapter", "run/checkpoints/checkpoint-10"):
        loaded = peft_mlm.load(str(tmp_path / place))
        assert torch.equal(loaded.model(input_ids=ids).logits, trained), place
        assert len(loaded.tokenizer) == 27
    merged = peft_mlm.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert merged["max_abs_logit_diff"] < 1e-5
    assert peft_mlm.evaluate(str(tmp_path / "run"))["loss"] == pytest.approx(
        result.metrics["adapted"]["loss"], rel=1e-6
    )


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM
torch.manual_seed(int.from_bytes(sys.argv[3].encode(), "little") % 1000)
model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval().double()
ids = torch.tensor([[int(i) for i in sys.argv[3].split(",")]])
torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach(), sys.argv[4])
"""


def plain_peft_logits(base: Path, adapter: Path, ids: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    words = [str(base), str(adapter), ",".join(map(str, ids[0].tolist())), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *words], check=True, capture_output=True)
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def antibody_texts(path: Path) -> Path:
    """Germline sequences that ship with the package, in the spelling AntiBERTy reads."""
    fasta = Path(peft_mlm.__file__).parent / "demo_assets" / "germline" / "mouse_train.fasta"
    records = ["".join(r.splitlines()[1:]) for r in fasta.read_text().split(">")[1:]]
    path.write_text("\n".join(" ".join(sequence) for sequence in records[:240]) + "\n")
    return path


@pytest.mark.slow
def test_antiberty_learns_mouse_and_reloads_and_merges_exactly(antiberty: Path, tmp_path: Path) -> None:
    result = peft_mlm.train(
        {
            "model_name_or_path": str(antiberty),
            "train_file": str(antibody_texts(tmp_path / "mouse.txt")),
            "rows": "line",
            "use_lora": True,
            "learning_rate": 1e-3,
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "validation_split_percentage": 10,
            "eval_steps": 12,
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert result.metrics["adapted"]["loss"] < result.metrics["base"]["loss"]
    assert result.metrics["adapter_bytes"] < 2_500_000
    ids = torch.arange(4, 25).unsqueeze(0)
    trained = result.model.double()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    plain = plain_peft_logits(antiberty, tmp_path / "run" / "adapter", ids, tmp_path)
    assert (plain - trained).abs().max().item() < 1e-9
    report = peft_mlm.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert report["max_abs_logit_diff"] < 1e-5
    assert report["tied"] is True


@pytest.mark.slow
def test_minilm_without_a_head_learns_one_and_ships_it(
    minilm_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = (
        "the model reads a row of tokens and the loss is a mean over the masked ones while the adapter stays small"
    )
    words = sentence.split(" ")
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 16)) for i in range(1, 120)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    with caplog.at_level("INFO", logger="peft_mlm"):
        result = peft_mlm.train(
            {
                "model_name_or_path": str(minilm_folder),
                "train_file": str(tmp_path / "t.txt"),
                "rows": "line",
                "use_lora": True,
                "learning_rate": 3e-3,
                "max_steps": 40,
                "per_device_train_batch_size": 16,
                "eval_steps": 40,
                "output_dir": str(tmp_path / "run"),
            }
        )
    assert "has no masked LM head of its own" in caplog.text
    assert result.metrics["base"]["accuracy"] < 0.05
    assert result.metrics["adapted"]["perplexity"] < result.metrics["base"]["perplexity"] / 50
    ids = torch.tensor([[101, 1996, 2944, 103, 1037, 5216, 102]])
    trained = result.model.double()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    plain = plain_peft_logits(minilm_folder, tmp_path / "run" / "adapter", ids, tmp_path)
    assert (plain - trained).abs().max().item() < 1e-9
    report = peft_mlm.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert report["max_abs_logit_diff"] < 1e-5
    with pytest.raises(ModelError, match="no masked LM head of its own"):
        peft_mlm.evaluate(str(tmp_path / "run"), use_base=True)


def bad_case(case: str, base: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model_name_or_path": str(base),
        "train_file": str(text),
        "output_dir": str(tmp_path / "run"),
        "use_lora": True,
        "max_steps": 1,
    }
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("AB\n")
    (tmp_path / "table.csv").write_text("name,words\na,b\n")
    (tmp_path / "empty_folder").mkdir()
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer_alone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.txt").write_text("mine")
    changes = {
        "missing file": {"train_file": str(tmp_path / "no.txt")},
        "empty file": {"train_file": str(tmp_path / "empty.txt")},
        "wrong column": {"train_file": str(tmp_path / "table.csv"), "text_column": "text"},
        "too short": {"train_file": str(tmp_path / "short.txt"), "validation_file": str(text), "rows": "run_mlm"},
        "one text": {"train_file": str(tmp_path / "short.txt")},
        "unknown model": {"model_name_or_path": "nobody/nothing"},
        "no config": {"model_name_or_path": str(tmp_path / "empty_folder")},
        "no weights": {"model_name_or_path": str(tmp_path / "tokenizer_alone")},
        "full folder": {"output_dir": str(tmp_path / "full")},
        "wrong target": {"lora_target_modules": "qury"},
        "nothing to resume": {"resume_from_checkpoint": True},
        "no adapter": {"adapter_name_or_path": str(tmp_path / "empty_folder"), "use_lora": None},
        "bad argument": {"learning_rate": "fast"},
    }
    return {name: value for name, value in {**arguments, **changes[case]}.items() if value is not None}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing file", "no.txt"),
        ("empty file", "empty.txt"),
        ("wrong column", "name"),
        ("too short", "max_seq_length"),
        ("one text", "validation"),
        ("unknown model", "nobody/nothing"),
        ("no config", "config.json"),
        ("no weights", "config.json"),
        ("full folder", "not empty"),
        ("wrong target", "qury"),
        ("nothing to resume", "resume"),
        ("no adapter", "no adapter"),
        ("bad argument", "learning_rate"),
    ],
)
def test_bad_input_gives_one_message_and_writes_and_loses_nothing(
    case: str, said: str, base_folder: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = bad_case(case, base_folder, text_file, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(PeftMlmError):
        peft_mlm.train(arguments)
    config = tmp_path / "arguments.json"
    config.write_text(json.dumps(arguments))
    assert main(["train", str(config)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (message,) = [line for line in err.splitlines() if line.startswith("peft-mlm: error:")]
    assert said in message
    assert "Traceback" not in err
    config.unlink()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_or_is_interrupted_says_so_in_its_summary(
    base_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_mlm.trainer import MaskedLMTrainer

    arguments = {"model_name_or_path": str(base_folder), "train_file": str(text_file), "use_lora": True, "max_steps": 5}
    plain = MaskedLMTrainer.compute_loss

    def stop_at(error: type[BaseException]) -> Any:
        def compute_loss(self: Any, *positional: Any, **named: Any) -> Any:
            if self.state.global_step == 2:
                raise error("stop")
            return plain(self, *positional, **named)

        return compute_loss

    for error, status in ((KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")):
        monkeypatch.setattr(MaskedLMTrainer, "compute_loss", stop_at(error))
        with pytest.raises(error):
            peft_mlm.train({**arguments, "output_dir": str(tmp_path / status)})
        assert json.loads((tmp_path / status / "summary.json").read_text())["status"] == status
        assert not (tmp_path / status / "adapter").exists()


def test_the_python_api_is_quiet_on_stdout(base_folder: Path, text_file: Path, tmp_path: Path) -> None:
    script = (
        "import sys, peft_mlm\n"
        "peft_mlm.train({'model_name_or_path': sys.argv[1], 'train_file': sys.argv[2], 'output_dir': sys.argv[3],"
        " 'use_lora': True, 'max_steps': 2, 'use_cpu': True})\n"
    )
    words = [str(base_folder), str(text_file), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_json_goes_to_stdout_alone(base_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["train", "--model_name_or_path", str(base_folder), "--train_file", str(text_file), "--use_lora"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--use_cpu", "--json"]
    done = subprocess.run([sys.executable, "-m", "peft_mlm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record["status"] == "finished"
    assert {"base", "adapted", "adapter_bytes", "run_folder", "seconds"} <= set(record)
    for noise in ("Warning", "warning", "Traceback", "Failed to load"):
        assert noise not in done.stderr, done.stderr
