from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError, DataError
from tests.tiny import save_base, tiny_model


def train(base: Path, tmp_path: Path, **options: Any) -> None:
    """Train on a text with nothing in it: what is said of names is said before it is read."""
    empty = tmp_path / "no.txt"
    empty.touch()
    text = {"train_file": str(empty), "output_dir": str(tmp_path / "run")}
    peft_mlm.train({"model_name_or_path": str(base), **text, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"use_lora": True, "lora_target_modules": "qury"},
            r"is named qury\. Layers .*attention\.self\.query",
        ),
        ({"use_lora": True, "lora_target_modules": "decoder"}, "--untie_embeddings"),
        ({"use_lora": True, "modules_to_save": "clss"}, "no module is named clss"),
        ({"use_lora": True, "lora_target_modules": "query", "layers_to_transform": "7"}, "there are 0 to 1"),
        ({"peft_method": "vera", "lora_target_modules": "qury"}, "no layer is named qury"),
    ],
)
def test_a_name_that_no_layer_has_is_found_before_the_text_is_read(
    options: dict[str, Any], said: str, base_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=said):
        train(base_folder, tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_architecture_is_found_before_the_text_is_read(base_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("bert")
    save_adapter(wrap(model, plan_adapter(model, PEFTArguments(use_lora=True))), tmp_path / "adapter", base_name="b")
    with pytest.raises(AdapterError, match="does not fit the base model"):
        train(base_folder, tmp_path, adapter_name_or_path=str(tmp_path / "adapter"))


def test_right_names_pass_on_to_the_text(base_folder: Path, tmp_path: Path) -> None:
    untied = {"untie_embeddings": True, "lora_target_modules": "word_embeddings,query"}
    for options in ({"lora_target_modules": "query"}, {"modules_to_save": "lm_head"}, untied):
        with pytest.raises(DataError, match=r"no\.txt"):
            train(base_folder, tmp_path, use_lora=True, **options)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "esm"])
def test_names_are_those_of_the_model_of_any_type(model_type: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", model_type)
    with pytest.raises(AdapterError, match=r"Layers of this model: .*(query|Wqkv)"):
        train(base, tmp_path, use_lora=True, lora_target_modules="no_such_layer")
