"""`peft-mlm inspect`: its figures are those of torch and PEFT; it opens nothing that can harm."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_mlm
from peft_mlm.inspection import inspect_shipped
from peft_mlm.shipped import find_shipped
from tests.commands.conftest import Answer
from tests.tiny import tiny_model

Command = Callable[..., Answer]


def inspect(path: Path) -> dict[str, Any]:
    return inspect_shipped(find_shipped(path))


@pytest.fixture
def adapter(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained adapter, to be spoilt."""
    return shutil.copytree(trained_run / "adapter", tmp_path / "adapter")


def with_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 3}, "alpha_pattern": {r"layer\.1\..*query": 40, "value": 1}},
        {"target_modules": ["word_embeddings", "query"], "init_lora_weights": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_each_change_is_that_of_the_matrix_that_peft_adds(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"], **options})
    model = get_peft_model(tiny_model("roberta"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    reference = PeftModel.from_pretrained(tiny_model("roberta"), str(tmp_path), autocast_adapter_dtype=False).double()
    layers = {layer["name"]: layer for layer in inspect(tmp_path)["layers"]}
    adapted = {name: m for name, m in reference.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(layers) == set(adapted)
    for name, module in adapted.items():
        expected = float(module.get_delta_weight("default").norm())
        assert layers[name]["delta_norm"] == pytest.approx(expected, rel=1e-6)
        assert layers[name]["scaling"] == pytest.approx(module.scaling["default"])
        assert layers[name]["rank"] == module.r["default"]


def test_it_tells_what_the_run_knows(trained_run: Path, command: Command) -> None:
    record = command("inspect", trained_run, "--json").record
    summary = json.loads((trained_run / "summary.json").read_text())
    assert (record["place"], record["kind"], record["method"], record["rank"]) == ("run", "adapter", "lora", 8)
    assert record["scaling"] == 2
    assert record["parameters"] == summary["trainable_parameters"]
    assert record["weight_bytes"] == summary["adapter_bytes"]
    assert record["folder_bytes"] == summary["saved_bytes"]
    assert record["dtypes"] == {"F32": record["parameters"]}
    assert record["training"]["base"] == summary["base"]
    assert record["training"]["adapted"] == summary["adapted"]
    assert record["base"]["architecture"] == "RobertaForMaskedLM"
    assert record["base"]["masking"]["mlm_probability"] == 0.15
    assert record["target_layers"] == len(record["layers"]) == sum(record["targets"].values()) == 12
    assert record["warnings"] == []
    shown = command("inspect", trained_run)
    assert shown.code == 0
    assert "LoRA" in shown.out
    assert f"{record['parameters']:,}" in shown.out


def test_run_adapter_checkpoint_and_model_are_told_apart(trained_run: Path, full_run: Path) -> None:
    for path, place, kind in (
        (trained_run, "run", "adapter"),
        (trained_run / "adapter", "folder", "adapter"),
        (trained_run / "checkpoints" / "checkpoint-15", "checkpoint", "adapter"),
        (full_run, "run", "model"),
        (full_run / "model", "folder", "model"),
        (full_run / "checkpoints" / "checkpoint-30", "checkpoint", "model"),
    ):
        record = inspect(path)
        assert (record["place"], record["kind"]) == (place, kind)
    assert inspect(trained_run / "checkpoints" / "checkpoint-15")["training"]["step"] == 15
    assert inspect(full_run)["architecture"] == "RobertaForMaskedLM"


def test_it_loads_no_library_that_computes(trained_run: Path) -> None:
    code = (
        "import sys; from peft_mlm.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pickle5'} & set(sys.modules)), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "inspect", str(trained_run)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.endswith("[]\n")


def test_the_base_fits_and_another_one_is_told_by_what_differs(
    trained_run: Path, base_folder: Path, other_base: Path, encoder: Path, tmp_path: Path, command: Command
) -> None:
    right = command("inspect", trained_run, "--base", base_folder, "--json").record["fit"]
    assert right["fits"] is True
    assert right["differences"] == []
    assert right["compared"] == 12
    assert right["fingerprint"] > 20
    same_shapes = command("inspect", trained_run, "--base", other_base, "--json").record["fit"]
    assert same_shapes["fits"] is False
    assert "weights of" in same_shapes["differences"][0]
    wider = tiny_model("roberta", hidden_size=48)
    wider.save_pretrained(tmp_path / "wider")
    told = command("inspect", trained_run, "--base", tmp_path / "wider")
    assert told.code == 0
    assert "does not fit" in told.out
    assert "lora_A.weight has the shape [8, 32], the base's weight [48, 48]" in told.out
    assert "no folder of a model" in command("inspect", trained_run, "--base", tmp_path / "none").fault
    other_kind = command("inspect", trained_run, "--base", encoder, "--json").record["fit"]
    assert other_kind["fits"] is not True


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_is_named_and_never_opened(adapter: Path, tmp_path: Path, command: Command) -> None:
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (adapter / name).write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    warnings = command("inspect", adapter, "--json").record["warnings"]
    assert "were not read: adapter_model.bin, optimizer.pt, training_args.bin" in warnings[0]
    (adapter / "adapter_model.safetensors").unlink()
    assert "a pickle, which can run code" in command("inspect", adapter).fault
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": "/home/ann/base"}, "adapter_config.json holds a local path (/home/ann/base)"),
        ({"base_model_name_or_path": "/odd/place"}, "adapter_config.json holds a local path (/odd/place)"),
        ({"task_type": "hf_abcdefghijABCDEFGHIJ12345"}, "adapter_config.json holds a token (hf_abc...)"),
        ({"lora_alhpa": 3}, "keys that the installed PEFT does not know: lora_alhpa"),
        ({"peft_type": "NEWEST"}, "peft_type is 'NEWEST', which is no method of PEFT"),
        ({"base_model_name_or_path": None}, "does not name the base"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "it brings code of its own"),
        ({"alpha_pattern": {"(a+)+": 2}}, "the scaling of 12 layers is not known"),
        ({"alpha_pattern": {"(": 2}}, "the scaling of 12 layers is not known"),
    ],
)  # fmt: skip
def test_what_is_odd_in_the_configuration_is_a_warning(
    changes: dict[str, Any], said: str, adapter: Path, command: Command
) -> None:
    with_config(adapter, **changes)
    assert any(said in warning for warning in inspect(adapter)["warnings"])
    shown = command("inspect", adapter)
    assert shown.code == 0
    assert said[:20] in shown.out


def test_values_that_are_no_number_and_an_adapter_of_zeros_are_warned_of(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: torch.zeros_like(t) if "lora_B" in name else t for name, t in weights.items()}, file)
    assert "every change it makes is zero: it leaves the base as it is" in inspect(adapter)["warnings"]
    first = next(iter(weights))
    save_file({**weights, first: torch.full_like(weights[first], float("nan"))}, file)
    assert f"{weights[first].numel():,} values are NaN or infinite" in inspect(adapter)["warnings"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 50_000,
     b'{"lora_alpha": "x", "alpha_pattern": [1], "modules_to_save": 5}',
     b'{"peft_type": ["LORA"], "target_modules": {"a": 1}, "auto_mapping": 7, "trainable_token_indices": "abc"}',
     b'{"peft_type": "LORA", "lora_alpha": 1e999, "use_rslora": "yes", "modules_to_save": [1, null]}'],
)  # fmt: skip
def test_a_configuration_of_anything_gives_an_answer_or_one_message(
    content: bytes, adapter: Path, command: Command
) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    answer = command("inspect", adapter, "--json")
    if answer.code == 0:
        assert answer.record["kind"] == "adapter"
    else:
        assert "damaged" in answer.fault


def test_the_licence_is_that_of_the_card_or_a_file(adapter: Path) -> None:
    assert inspect(adapter)["licence"] is None
    (adapter / "LICENSE.txt").write_text("MIT")
    assert inspect(adapter)["licence"] == "LICENSE.txt"
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    assert inspect(adapter)["licence"] == "apache-2.0"
    (adapter / "README.md").write_text("---\n" + "a: [" * 5000 + "\n---\n# x\n")
    assert inspect(adapter)["licence"] == "LICENSE.txt"


def test_letters_that_a_terminal_obeys_are_not_printed(adapter: Path, command: Command) -> None:
    with_config(adapter, base_model_name_or_path="base\x1b[2Jx")
    assert "\x1b[2J" not in command("inspect", adapter).out


@pytest.mark.usefixtures("untouched")
def test_what_is_no_adapter_and_no_model_is_said_in_one_sentence(
    tmp_path: Path, full_run: Path, base_folder: Path, command: Command
) -> None:
    assert "does not exist" in command("inspect", tmp_path / "nothing").fault
    assert "holds neither a run, nor an adapter" in command("inspect", tmp_path).fault
    assert "needs no base" in command("inspect", full_run, "--base", base_folder).fault


def test_an_adapter_of_another_method_is_described_by_its_tensors(base_folder: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["query"], feedforward_modules=[], init_ia3_weights=False)
    get_peft_model(tiny_model("roberta"), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    record = inspect(tmp_path)
    assert (record["method"], record["title"], record["rank"]) == ("ia3", "(IA)³", None)
    assert record["target_layers"] == 2
    assert all(layer["delta_norm"] is None and list(layer["norms"]) == ["ia3_l"] for layer in record["layers"])


def test_inspect_is_a_function_too(trained_run: Path) -> None:
    assert peft_mlm.inspect(trained_run)["method"] == "lora"
    assert peft_mlm.verify(trained_run)["ok"] is True
