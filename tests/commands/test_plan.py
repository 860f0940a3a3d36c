from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm.commands.plan import GPUS, read_gpu
from peft_mlm.config import read_arguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.memory import CUDA_CONTEXT, build_outline
from peft_mlm.planning import Device, make_plan
from tests.commands.conftest import Answer
from tests.hub_server import Hub
from tests.tiny import save_base

pytest_plugins = ("tests.hub_fixture",)


@pytest.fixture
def short_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out most of what a plan counts for its tables."""
    monkeypatch.setattr("peft_mlm.planning.BATCH_SIZES", (1, 8))
    monkeypatch.setattr("peft_mlm.planning.ATTENTION", ())


def test_a_plan_says_what_a_run_takes_and_that_it_fits(
    command: Callable[..., Answer],
    base_folder: Path,
    text_file: Path,
    untouched: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("plan", "--model_name_or_path", base_folder, "--train_file", text_file, "--use_lora", "--rows", "line")
    record = command(*words, "--gpu", "12GB", "--json").record
    assert record["fits"] is True
    assert record["remedies"] == []
    assert sum(record["parts"].values()) == record["predicted_bytes"]
    assert record["parts"]["weights"] == sum(record["weights"].values())
    assert (record["device"]["kind"], record["device"]["total_bytes"]) == ("cuda", 12 * 2**30)
    assert record["device"]["taken_bytes"] == CUDA_CONTEXT
    assert (record["dtype"], record["computes_in"]) == ("bfloat16", "bfloat16")
    assert record["steps"] == 3 * -(-record["rows"] // 8)
    assert [row["rows"] for row in record["batch_sizes"]] == [1, 2, 4, 8, 16, 32, 64]
    assert {(row["attention"], row["checkpointing"]) for row in record["activations"]} == {
        (name, on) for name in ("eager", "sdpa") for on in (False, True)
    }
    monkeypatch.setattr("peft_mlm.planning.BATCH_SIZES", (1,))
    plain = command(*words, "--use_cpu")
    assert plain.code == 0
    for part in ("trained parameters", "weights of the base", "activations", "by rows of a batch", "It fits"):
        assert part in plain.out


def test_what_does_not_fit_gets_remedies_in_order_each_less_than_the_one_before(
    tmp_path: Path, short_tables: None
) -> None:
    folder = save_base(tmp_path / "base", "bert", hidden_size=128, num_hidden_layers=3, max_position_embeddings=512)
    values = {"model_name_or_path": folder, "max_seq_length": 512, "per_device_train_batch_size": 8}
    arguments = read_arguments(values={**values, "do_eval": False}, planned=True)
    record = make_plan(arguments, Device("cuda", "a very small GPU", 2**20, 0))
    assert record["fits"] is False
    flags = [row["flags"] for row in record["remedies"]]
    assert flags[0] == "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert flags[2] == "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    assert flags[3:7] == ["--activation_checkpointing", "--use_lora", "--load_in_4bit", "--max_seq_length 256"]
    predicted = [record["predicted_bytes"], *(row["predicted_bytes"] for row in record["remedies"])]
    assert all(later < earlier for earlier, later in itertools.pairwise(predicted)), predicted
    enough = predicted[3]
    fitting = make_plan(arguments, Device("cuda", "a GPU", enough, 0))["remedies"]
    assert [row["fits"] for row in fitting] == [False, False, True]
    assert fitting[-1]["predicted_bytes"] == enough


def test_remedies_do_what_they_say(tmp_path: Path, short_tables: None) -> None:
    folder = save_base(tmp_path / "base", "bert", hidden_size=128)
    values: dict[str, Any] = {"model_name_or_path": folder, "use_lora": True, "per_device_train_batch_size": 8}
    plain = peft_mlm.plan(values, gpu="1GB")
    less = peft_mlm.plan({**values, "activation_checkpointing": True}, gpu="1GB")
    by_rows = {row["rows"]: row for row in plain["batch_sizes"]}
    assert by_rows[8]["predicted_bytes"] == plain["predicted_bytes"]
    assert by_rows[8]["with_checkpointing"] == less["predicted_bytes"] < plain["predicted_bytes"]
    four = peft_mlm.plan({**values, "load_in_4bit": True}, gpu="1GB")
    assert four["weights"]["quantised"] < plain["weights"]["encoder"]
    assert (four["holds_in"], four["trainable_parameters"]) == ("4 bits", plain["trainable_parameters"])


@pytest.mark.parametrize(
    ("text", "count"),
    [("12GB", 12 * 2**30), ("12", 12 * 2**30), ("8 GiB", 8 * 2**30), ("11.5g", int(11.5 * 2**30)),
     ("6144MB", 6 * 2**30), ("RTX 3060", 12 * 2**30), ("nvidia geforce rtx-4090", 24 * 2**30), ("4070", 12 * 2**30)],
)  # fmt: skip
def test_a_gpu_is_named_by_its_memory_or_its_name(text: str, count: int) -> None:
    assert read_gpu(text)[1] == count


def test_a_gpu_without_bfloat16_computes_in_float32(base_folder: Path, short_tables: None) -> None:
    record = peft_mlm.plan({"model_name_or_path": base_folder, "use_lora": True}, gpu="T4")
    assert not GPUS["T4"][1]
    assert (record["dtype"], record["computes_in"]) == ("float32", "float32")


@pytest.mark.parametrize("text", ["big", "-3GB", "0", "RTX 9999", "12TB"])
def test_a_gpu_that_is_neither_is_refused_before_anything_is_read(
    command: Callable[..., Answer], text: str, untouched: None
) -> None:
    fault = command("plan", "--model_name_or_path", "nowhere", f"--gpu={text}").fault
    assert repr(text) in fault
    assert "12GB" in fault
    with pytest.raises(ArgumentsError):
        read_gpu(text)


def test_mistakes_are_told_as_by_train(command: Callable[..., Answer], base_folder: Path) -> None:
    assert "No model is given" in command("plan", "--use_lora").fault
    assert "lora_rr" in command("plan", "--model_name_or_path", base_folder, "--lora_rr", "4").fault
    assert "--gpu needs a value" in command("plan", "--gpu", "--use_lora").fault
    assert "both given" in command("plan", "--gpu", "12GB", "--device").fault
    assert (
        "no layer is named"
        in command("plan", "--model_name_or_path", base_folder, "--use_lora", "--lora_target_modules", "nothing").fault
    )


def test_a_run_s_plan_stands_beside_what_was_measured(trained_run: Path, short_tables: None) -> None:
    summary = json.loads((trained_run / "summary.json").read_text())
    memory = summary["memory"]
    assert set(memory) == {"device", "predicted_bytes", "measured_bytes", "parts"}
    assert memory["device"] == "cpu"
    assert sum(memory["parts"].values()) == memory["predicted_bytes"]
    record = peft_mlm.plan(trained_run)
    assert record["measured_bytes"] == memory["measured_bytes"]
    assert record["trainable_parameters"] == summary["trainable_parameters"]
    assert record["total_parameters"] == summary["total_parameters"]
    # The rows of the run are as long as the plan has found them to be.
    assert record["predicted_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.02)


def test_of_a_model_on_the_hub_no_weights_are_fetched(hub: Hub, base_folder: Path) -> None:
    hub.publish("models", "someone/base", base_folder)
    done = subprocess.run(
        [sys.executable, "-m", "peft_mlm", "plan", "--model_name_or_path", "someone/base", "--use_lora", "--gpu", "8GB",
         "--max_steps", "10", "--json"],
        env=hub.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    values = {"model_name_or_path": base_folder, "use_lora": True, "dtype": "bfloat16"}
    outline = build_outline(read_arguments(values=values, planned=True))
    assert (record["trainable_parameters"], record["total_parameters"]) == (outline.trainable, outline.total)
    assert record["weights"] == outline.weights
    kept = [path.name for path in Path(hub.env["HF_HOME"]).rglob("*") if path.is_file()]
    assert "config.json" in kept
    assert not [name for name in kept if name.endswith((".safetensors", ".bin", ".incomplete"))]
    size = (base_folder / "model.safetensors").stat().st_size
    assert max(path.stat().st_size for path in Path(hub.env["HF_HOME"]).rglob("*") if path.is_file()) < size
