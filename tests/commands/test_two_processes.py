"""Training by two processes (torchrun, gloo): the same run as one process that accumulates two batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import peft_mlm

# Run by each process: the arguments of several runs, one after the other; the last has its logits in many pieces.
EACH_PROCESS = """
import json, sys, torch
torch.set_num_threads(1)
import peft_mlm
from peft_mlm.gathered_head import sum_over_masked
for arguments in json.loads(sys.argv[1]):
    sum_over_masked.__kwdefaults__["logits_bytes"] = 300 if arguments["output_dir"].endswith("pieces") else 2**28
    peft_mlm.train(arguments)
torch.distributed.destroy_process_group()
"""
# SGD takes no root of small gradients, which would blow rounding up.
SAME = {"use_lora": True, "max_steps": 6, "eval_steps": 3, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.3}
RUNS: dict[str, dict[str, Any]] = {
    "chunks": {"max_seq_length": 32},
    "trained head in pieces": {
        "modules_to_save": ["lm_head"],
        "rows": "line",
        "train_sampling_strategy": "random",
        "activation_checkpointing": True,
    },
    "by length": {"rows": "line"},
}


@pytest.fixture(scope="module")
def folders(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """For each run the folder of one process with two micro-batches, and that of two processes with one each."""
    root = tmp_path_factory.mktemp("processes")
    files = {"model_name_or_path": base_folder, "train_file": text_file, "validation_file": held_out, "use_cpu": True}
    shared = {**SAME, **{name: str(value) for name, value in files.items()}, "per_device_train_batch_size": 4}
    pairs = {name: (root / f"one {name}", root / f"two {name}") for name in RUNS}
    for name, (one, _) in pairs.items():
        peft_mlm.train({**shared, **RUNS[name], "output_dir": one, "gradient_accumulation_steps": 2})
    both = [{**shared, **RUNS[name], "output_dir": str(two)} for name, (_, two) in pairs.items()]
    script = root / "each_process.py"
    script.write_text(EACH_PROCESS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(peft_mlm.__file__).parents[1])}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*words, json.dumps(both)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return pairs


def curve(run: Path) -> list[tuple[int, str, float]]:
    """Loss, gradient norm and evaluation loss by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "eval_loss")
    return [(record["step"], name, record[name]) for record in records for name in names if name in record]


@pytest.mark.parametrize("name", ["chunks", "trained head in pieces"])
def test_two_processes_train_as_one_with_two_micro_batches(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    one, two = folders[name]
    single, double = curve(one), curve(two)
    assert [entry[:2] for entry in double] == [entry[:2] for entry in single]
    assert [entry[2] for entry in double] == pytest.approx([entry[2] for entry in single], abs=3e-6)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["adapted"]["loss"] < summary["base"]["loss"] - 0.005
    alone = json.loads((one / "summary.json").read_text())
    for part in ("base", "adapted"):  # standard errors too: each process gives its own clusters
        assert summary[part] == pytest.approx(alone[part], rel=1e-5)
    assert summary["change"]["loss"] == pytest.approx(alone["change"]["loss"], abs=1e-5)
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) < 1e-6


def test_rows_batched_by_length_train_in_two_processes(folders: dict[str, tuple[Path, Path]]) -> None:
    _, two = folders["by length"]
    summary = json.loads((two / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert summary["adapted"]["loss"] < summary["base"]["loss"]


def test_one_process_alone_writes_the_run(folders: dict[str, tuple[Path, Path]]) -> None:
    for one, two in folders.values():
        assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
        assert len((two / "metrics.jsonl").read_text().splitlines()) == len(
            (one / "metrics.jsonl").read_text().splitlines()
        )
