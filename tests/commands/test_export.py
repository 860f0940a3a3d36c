"""`export`: what is written opens in plain libraries and computes what was exported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from peft_mlm import onnx_export
from peft_mlm.arguments import ModelArguments
from peft_mlm.errors import ExportError, ModelError
from peft_mlm.model import load_base
from tests.commands.conftest import Answer
from tests.tiny import difference, save_base, save_encoder

TEXTS = ["ABCDEFGH", "AB", "TSRQPONMLKJIHGFEDCBA"]


@pytest.fixture(scope="module")
def merged(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "merged"
    peft_mlm.merge(str(trained_run), folder)
    return folder


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.as_tensor(model.eval().float()(**batch)[0][batch["attention_mask"].bool()])


def in_onnx_runtime(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    return torch.from_numpy(given)[batch["attention_mask"].bool()]


def assert_no_local_path(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            assert not re.search(rb"(/(root|home|tmp)/|site-packages|File \")", file.read_bytes()), file


def test_the_encoder_alone_is_the_merged_models(
    command: Callable[..., Answer], trained_run: Path, merged: Path, tmp_path: Path
) -> None:
    record = command("export", trained_run, "--output_dir", tmp_path / "out", "--encoder_only", "--json").record
    assert record["max_abs_diff"] == 0
    assert record["fresh"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert record["merge"]["max_abs_logit_diff"] < 1e-5
    encoder = AutoModel.from_pretrained(tmp_path / "out")
    assert encoder.config.architectures == ["RobertaModel"]
    source = AutoModelForMaskedLM.from_pretrained(merged).base_model.state_dict()
    assert source
    for name, tensor in source.items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert_no_local_path(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_weights_are_the_float32_ones_rounded_once(dtype: str, merged: Path, tmp_path: Path) -> None:
    record = peft_mlm.export(str(merged), tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == kind
    source = AutoModelForMaskedLM.from_pretrained(merged)
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(kind)), name
    assert 0 < record["max_abs_diff"] < 0.1
    assert record["merge"] is None


def test_onnx_computes_the_logits_at_any_batch_and_length(
    command: Callable[..., Answer], trained_run: Path, merged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record = command("export", trained_run, "--output_dir", out, "--format", "onnx", "--json").record
    assert record["output"] == "logits"
    assert not record["external_data"]
    assert record["max_abs_diff"] < 5e-5
    assert len({tuple(shape) for shape in record["shapes"]}) >= 4
    model, batch = AutoModelForMaskedLM.from_pretrained(merged), batch_of(out)
    for part in (batch, {name: tensor[:1, :5] for name, tensor in batch.items()}):
        assert difference(in_onnx_runtime(out, part), outputs(model, part)) < 1e-5
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    assert_no_local_path(out)


def test_weights_of_a_large_encoder_lie_in_a_file_of_their_own(merged: Path, tmp_path: Path) -> None:
    loaded = load_base(ModelArguments(model_name_or_path=str(merged)))
    report = onnx_export.write_onnx(loaded.model, loaded.tokenizer, tmp_path, encoder_only=True, largest_file=1000)
    assert report["external_data"]
    assert report["output"] == "last_hidden_state"
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    batch = batch_of(tmp_path)
    expected = outputs(AutoModelForMaskedLM.from_pretrained(merged).base_model, batch)
    assert difference(in_onnx_runtime(tmp_path, batch), expected) < 1e-5


def test_a_type_that_cannot_be_traced_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "longformer")
    with pytest.raises(ExportError, match="cannot write a longformer"):
        peft_mlm.export(str(base), tmp_path / "out", format="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_another_models_file_is_found_out(merged: Path, tmp_path: Path) -> None:
    """The comparison can fail: the file of the merged model against another one."""
    loaded = load_base(ModelArguments(model_name_or_path=str(merged)))
    report = onnx_export.write_onnx(loaded.model, loaded.tokenizer, tmp_path)
    with torch.no_grad():
        loaded.model.base_model.encoder.layer[0].output.dense.bias[0] += 0.1
    wrapped = onnx_export._OneOutput(loaded.model)
    with pytest.raises(ExportError, match=r"outputs that differ by .* nothing was written"):
        onnx_export._compare(wrapped, loaded.model, loaded.tokenizer, tmp_path / "model.onnx")
    assert report["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_transformers_encodes_as_plain_pooling_does(pooling: str, merged: Path, tmp_path: Path) -> None:
    record = peft_mlm.export(str(merged), tmp_path / "out", format="sentence_transformers", pooling=pooling)
    assert (record["dimension"], record["max_seq_length"], record["encoder_only"]) == (32, 62, True)
    given = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode([*TEXTS, "A" * 100])
    encoder, tokenizer = AutoModel.from_pretrained(tmp_path / "out").eval(), AutoTokenizer.from_pretrained(merged)
    for text, vector in zip([*TEXTS, "A" * 100], given, strict=True):
        tokens = tokenizer(text)["input_ids"]
        ids = torch.tensor([tokens if len(tokens) <= 62 else [*tokens[:61], 2]])
        with torch.no_grad():
            vectors = encoder(input_ids=ids)[0][0].numpy()
        expected = {"mean": vectors.mean(0), "cls": vectors[0], "max": vectors.max(0)}[pooling]
        assert np.abs(vector - expected).max() < 1e-5
    assert_no_local_path(tmp_path / "out")


def test_a_base_without_a_head_can_give_its_encoder_alone(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    before = AutoModel.from_pretrained(encoder)
    peft_mlm.export(str(encoder), tmp_path / "out", encoder_only=True)
    batch = batch_of(encoder)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "out"), batch), outputs(before, batch))
    with pytest.raises(ModelError, match="Add --encoder_only"):
        peft_mlm.export(str(encoder), tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--format", "onnx", "--dtype", "float16"], "an ONNX file is written in float32"),
        (["--pooling", "cls"], "--pooling cls is for --format sentence_transformers"),
        (["--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_mistakes_are_found_before_anything_is_loaded(
    command: Callable[..., Answer], tmp_path: Path, flags: list[str], why: str
) -> None:
    assert why in command("export", "nowhere/at-all", "--output_dir", tmp_path / "out", *flags).fault


def test_nothing_is_overwritten(command: Callable[..., Answer], merged: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "is not empty" in command("export", merged, "--output_dir", tmp_path).fault
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("onnx", "onnxscript", "onnx"), ("sentence_transformers", "sentence_transformers", "sentence-transformers")],
)
def test_a_missing_package_is_named_with_its_extra(
    command: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    package: str,
    extra: str,
) -> None:
    real: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    fault = command("export", "nowhere/at-all", "--output_dir", tmp_path / "out", "--format", format).fault
    assert f"needs {package}, which is not installed: pip install 'peft-mlm[{extra}]'" in fault
