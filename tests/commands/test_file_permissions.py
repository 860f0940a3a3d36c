"""Whoever may read a run's other files may read its weights: safetensors alone would write them for the owner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peft_mlm
from peft_mlm.run_folder import staged
from tests.adapters import save_random_adapter


@pytest.fixture
def ordinary() -> int:
    """The permissions of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def permissions(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


def check(folder: Path, ordinary: int) -> None:
    seen = permissions(folder)
    assert any(name.endswith(".safetensors") for name in seen)
    assert seen == dict.fromkeys(seen, ordinary)


def test_what_a_run_writes(trained_run: Path, full_run: Path, ordinary: int) -> None:
    for run in (trained_run, full_run):
        check(run, ordinary)
    assert list((trained_run / "checkpoints").rglob("*.safetensors"))


def test_a_checkpoint_with_a_training_state(base_folder: Path, text_file: Path, tmp_path: Path, ordinary: int) -> None:
    given = {"model_name_or_path": str(base_folder), "train_file": str(text_file), "max_steps": 2, "save_steps": 1}
    peft_mlm.train({**given, "output_dir": str(tmp_path / "run"), "use_lora": True, "init_lora_weights": "pissa"})
    assert list((tmp_path / "run").rglob("training_state.safetensors"))
    check(tmp_path / "run", ordinary)


def test_what_is_made_of_adapters_and_models(
    trained_run: Path, full_run: Path, base_folder: Path, tmp_path: Path, ordinary: int
) -> None:
    loha = save_random_adapter(base_folder, tmp_path / "loha", 1, config="LoHaConfig", r=2)
    peft_mlm.merge(str(trained_run), tmp_path / "file by file", proof=False)
    assert peft_mlm.merge(str(loha), tmp_path / "built", base=str(base_folder), proof=False)["built_because"]
    peft_mlm.combine([str(trained_run), str(trained_run)], tmp_path / "combined")
    peft_mlm.convert(str(loha), tmp_path / "converted", base=str(base_folder))
    peft_mlm.extract(str(full_run), tmp_path / "extracted", rank=2)
    peft_mlm.export(str(trained_run), tmp_path / "exported", encoder_only=True)
    for name in ("file by file", "built", "combined", "converted", "extracted", "exported"):
        check(tmp_path / name, ordinary)


def test_the_umask_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "folder") as folder:
            save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
            (folder / "run.sh").touch(mode=0o700)
    finally:
        os.umask(before)
    assert permissions(tmp_path / "folder") == {"a.safetensors": 0o640, "run.sh": 0o740}
