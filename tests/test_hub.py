from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.hub_server import Hub
from tests.tiny import save_base

pytest_plugins = ["tests.hub_fixture"]

README = """---
configs:
- config_name: cola
  data_files:
  - split: train
    path: cola/train.{0}
  - split: validation
    path: cola/validation.{0}
  - split: test
    path: cola/test.{0}
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train.{0}
  - split: test
    path: sst2/test.{0}
---
# Sentences
"""
SENTENCES = {
    "cola/train": ["The book was by John written.", "Books were sent to each other by the students."],
    "cola/validation": ["She voted for herself."],
    "cola/test": ["Bill whistled past the house."],
    "sst2/train": ["a gorgeous, witty, seductive movie", "lacks wit", "so so", "fine"],
    "sst2/test": ["uneasy mishmash of styles"],
}
# Each call of load_text in one process of its own: importing the libraries is what takes long.
CALLS = """
import json, sys, time
from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.data import load_text
from peft_mlm.errors import DataError
results = []
for call in json.loads(sys.argv[1]):
    start, token = time.monotonic(), call.pop("token", None)
    try:
        text = load_text(DataTrainingArguments(**call), token=token)
        result = {"texts": {name: split["text"][:] for name, split in text.splits.items()}, "facts": text.facts}
    except DataError as error:
        result = {"error": str(error), "cause": type(error.__cause__).__name__}
    results.append({**result, "seconds": time.monotonic() - start})
print(json.dumps(results))
"""
MODEL = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForMaskedLM, AutoTokenizer
name, revision, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
model = AutoModelForMaskedLM.from_pretrained(name, revision=revision)
with torch.no_grad():
    print(model(**tokenizer(text, return_tensors="pt")).logits.sum().item())
print(snapshot_download(name, revision=revision))
"""


def csv_files(sentences: dict[str, list[str]]) -> dict[str, bytes | str]:
    rows = {name: "".join(f'"{s}",1,{i}\n' for i, s in enumerate(texts)) for name, texts in sentences.items()}
    return {
        "README.md": README.format("csv"),
        **{f"{name}.csv": f"sentence,label,idx\n{r}" for name, r in rows.items()},
    }


def parquet_files(sentences: dict[str, list[str]]) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"README.md": README.format("parquet")}
    for name, texts in sentences.items():
        buffer = io.BytesIO()
        pq.write_table(pa.table({"sentence": texts, "label": [1] * len(texts)}), buffer)
        files[f"{name}.parquet"] = buffer.getvalue()
    return files


def run(script: str, *arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(hub: Hub, *calls: dict[str, Any], **env: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(run(CALLS, json.dumps(calls), env=hub.env | env).splitlines()[-1])
    return results


def test_a_data_set_is_loaded_by_name_config_revision_and_token(hub: Hub) -> None:
    old = hub.publish("datasets", "nyu-mll/glue", csv_files(SENTENCES))
    new = hub.publish("datasets", "nyu-mll/glue", csv_files({**SENTENCES, "cola/train": ["Now.", "Then.", "Never."]}))
    hub.move("datasets", "glue", "nyu-mll/glue")
    private = hub.publish("datasets", "org/cola-like", parquet_files(SENTENCES), token="hf_right")
    glue = {"dataset_name": "glue", "dataset_config_name": "cola"}
    newest, pinned, columns, unsplit = load(
        hub,
        glue,
        {**glue, "dataset_revision": old},
        {"dataset_name": "org/cola-like", "dataset_config_name": "cola", "token": "hf_right"},
        {**glue, "dataset_config_name": "sst2", "validation_split_percentage": 50},
    )

    assert newest["texts"] == {"train": ["Now.", "Then.", "Never."], "validation": SENTENCES["cola/validation"]}
    assert newest["facts"]["train"]["source"] == {
        "dataset": "nyu-mll/glue",
        "config": "cola",
        "split": "train",
        "revision": None,
        "commit": new,
    }
    assert newest["facts"]["validation"]["origin"] == "given"
    assert newest["facts"]["validation"]["text_column"] == "sentence"
    assert pinned["texts"]["train"] == SENTENCES["cola/train"]
    assert pinned["facts"]["train"]["source"]["commit"] == old
    assert columns["texts"] == {split: SENTENCES[f"cola/{split}"] for split in ("train", "validation")}
    assert columns["facts"]["train"]["source"]["commit"] == private
    # Without a validation split the test split stays untouched: the training text is split.
    assert sorted(unsplit["texts"]["train"] + unsplit["texts"]["validation"]) == sorted(SENTENCES["sst2/train"])
    assert len(unsplit["texts"]["validation"]) == 2


def test_a_data_set_that_cannot_be_loaded_is_one_sentence_with_a_remedy(hub: Hub) -> None:
    hub.publish("datasets", "org/cola-like", parquet_files(SENTENCES), token="hf_right")
    hub.publish("datasets", "org/open", csv_files(SENTENCES))
    hub.publish("datasets", "org/broken", {"train.jsonl": '{"text": "a"}\n{"text":'})
    hub.publish("datasets", "org/numbers", {"train.csv": "a,b\n1,2\n3,4\n"})
    results = load(
        hub,
        {"dataset_name": "org/nowhere"},
        {"dataset_name": "org/cola-like", "dataset_config_name": "cola"},
        {"dataset_name": "org/cola-like", "dataset_config_name": "cola", "token": "hf_wrong"},
        {"dataset_name": "org/open"},
        {"dataset_name": "org/open", "dataset_config_name": "cool"},
        {"dataset_name": "org/open", "dataset_config_name": "cola", "dataset_revision": "v9"},
        {"dataset_name": "org/open", "dataset_config_name": "cola", "text_column": "label"},
        {"dataset_name": "org/broken"},
        {"dataset_name": "org/numbers"},
    )
    wanted = [
        ("has no data set org/nowhere", "--dataset_name"),
        ("org/cola-like, or it is private", "--token"),
        ("refuses the token", "--token"),
        ("several configs", "--dataset_config_name: cola, sst2"),
        ("no config 'cool'", "--dataset_config_name: cola, sst2"),
        ("no revision v9", "--dataset_revision"),
        ("'label' of the data set org/open does not hold text", "--text_column: 'sentence'"),
        ("org/broken cannot be loaded: JSON parse error", "Look at its name, its files"),
        ("the data set org/numbers", "none of its columns does ('a', 'b')"),
    ]
    for result, (fault, remedy) in zip(results, wanted, strict=True):
        assert fault in result["error"]
        assert remedy in result["error"]
        assert "\n" not in result["error"]
        assert result["seconds"] < 10


def test_without_the_hub_only_what_is_cached_is_loaded_and_nothing_is_asked(hub: Hub) -> None:
    commit = hub.publish("datasets", "nyu-mll/glue", csv_files(SENTENCES))
    hub.move("datasets", "glue", "nyu-mll/glue")
    glue = {"dataset_name": "glue", "dataset_config_name": "cola"}
    online = load(hub, glue)[0]
    hub.requests.clear()
    cached, pinned, other, absent = load(
        hub,
        glue,
        {**glue, "dataset_revision": commit},
        {**glue, "dataset_revision": "v2"},
        {"dataset_name": "org/never-seen"},
        HF_HUB_OFFLINE="1",
    )
    assert cached["texts"] == pinned["texts"] == online["texts"]
    assert cached["facts"]["train"] == online["facts"]["train"]
    assert f"commit {commit} is in the cache" in other["error"]
    assert "org/never-seen is not in the cache" in absent["error"]
    assert "HF_HUB_OFFLINE" in absent["error"]
    assert absent["seconds"] < 10
    assert hub.requests == []


def test_a_model_is_loaded_by_name_and_revision(hub: Hub, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "model")
    text = "ACDEF"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits.sum().item()
    commit = hub.publish("models", "org/tiny", folder)
    hub.publish("models", "org/tiny", {"README.md": "the weights are gone"})
    hub.move("models", "tiny", "org/tiny")

    logits, snapshot = run(MODEL, "tiny", commit, text, env=hub.env).splitlines()[-2:]

    assert float(logits) == pytest.approx(expected, abs=1e-4)
    assert {p.name: p.read_bytes() for p in Path(snapshot).iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert {status for _, _, status in hub.requests} <= {200, 206, 307, 404}
