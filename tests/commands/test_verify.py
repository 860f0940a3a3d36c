"""`peft-mlm verify`: what is whole passes, whatever was done to it is named, and nothing is ever run or crashes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_mlm.checksums import CHECKSUMS, write_checksums
from peft_mlm.shipped import find_shipped
from peft_mlm.verification import verify_shipped
from tests.commands.conftest import Answer
from tests.commands.test_inspect import Bomb

Command = Callable[..., Answer]
FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def adapter(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained adapter, to be spoilt."""
    return shutil.copytree(trained_run / "adapter", tmp_path / "adapter")


def test_what_training_wrote_is_sound(trained_run: Path, full_run: Path, command: Command) -> None:
    for path in (trained_run, trained_run / "adapter", full_run, full_run / "model"):
        record = command("verify", path, "--json").record
        assert record["ok"] is True
        assert record["faults"] == record["notices"] == []
        folder = path / record["kind"] if (path / record["kind"]).is_dir() else path
        sums = json.loads((folder / CHECKSUMS).read_text())["files"]
        assert record["checksums"] == len(sums)
        assert set(sums) == {p.name for p in folder.iterdir()} - {CHECKSUMS, "README.md"}
        assert record["values"] > 1000
    assert "verified" in command("verify", trained_run).out


def test_a_checkpoint_is_checked_and_its_pickles_are_named_unopened(trained_run: Path, command: Command) -> None:
    record = command("verify", trained_run / "checkpoints" / "checkpoint-15", "--json").record
    assert record["ok"] is True
    assert any("optimizer.pt" in notice for notice in record["notices"])


def test_each_change_is_named(adapter: Path, command: Command) -> None:
    config = adapter / "adapter_config.json"
    (adapter / "README.md").write_text("my own words")
    assert command("verify", adapter).code == 0  # the card is for people
    config.write_text(config.read_text() + " ")
    assert "adapter_config.json is not what was written" in command("verify", adapter).fault
    write_checksums(adapter)
    (adapter / "base_fingerprint.json").unlink()
    (adapter / "more.txt").write_text("x")
    fault = command("verify", adapter).fault
    assert "base_fingerprint.json is missing" in fault
    assert "more.txt was not written with the others" in fault
    assert "adapter_config" not in fault


def test_one_value_that_is_no_number_is_found(adapter: Path, command: Command) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    weights[name][1, 2] = float("inf")
    save_file(weights, file)
    write_checksums(adapter)
    fault = command("verify", adapter).fault
    assert "holds 1 values that are NaN or infinite" in fault
    assert name in fault


def test_a_pickle_is_never_opened(adapter: Path, tmp_path: Path, command: Command) -> None:
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    assert "adapter_model.bin was not written with the others" in command("verify", adapter).fault
    write_checksums(adapter)
    record = command("verify", adapter, "--json").record
    assert "adapter_model.bin: pickles" in record["notices"][0]
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in command("verify", adapter).fault
    assert not (tmp_path / "opened").exists()


def test_a_pickle_under_the_name_of_safetensors_is_no_safetensors(
    adapter: Path, tmp_path: Path, command: Command
) -> None:
    torch.save(Bomb(tmp_path / "opened"), adapter / "adapter_model.safetensors")
    assert "adapter_model.safetensors is damaged" in command("verify", adapter).fault
    assert "is damaged" in command("inspect", adapter).fault
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 5}', '{"files": {"a": {"sha256": "x"}}}', "{" * 9999])
def test_damaged_checksums_are_a_fault(content: str, adapter: Path, command: Command) -> None:
    (adapter / CHECKSUMS).write_text(content)
    assert "checksums.json is damaged" in command("verify", adapter).fault


def test_checksums_do_not_lead_out_of_the_folder(adapter: Path, command: Command) -> None:
    (adapter.parent / "secret.txt").write_text("x")
    record = json.loads((adapter / CHECKSUMS).read_text())
    record["files"]["../secret.txt"] = {"sha256": "0" * 64, "bytes": 1}
    (adapter / CHECKSUMS).write_text(json.dumps(record))
    assert "../secret.txt is missing" in command("verify", adapter).fault


def test_what_is_no_plain_file_does_not_stop_it(adapter: Path, command: Command) -> None:
    (adapter / CHECKSUMS).unlink()
    os.mkfifo(adapter / "pipe.json")
    assert "pipe.json is no plain file" in command("verify", adapter).fault
    (adapter / "pipe.json").unlink()
    os.mkfifo(adapter / "pipe.safetensors")
    assert "pipe.safetensors is not a plain file" in command("verify", adapter).fault
    assert command("inspect", adapter).code == 0


@FUZZ
@given(data=st.data())
def test_any_damage_to_any_file_gives_a_verdict_and_the_checksums_find_it(data: st.DataObject, adapter: Path) -> None:
    """Cut off, flipped bits, or random bytes; with checksums it is always found, without them it never crashes."""
    whole = {file: file.read_bytes() for file in adapter.iterdir() if file.name != "README.md"}
    file = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[file])
    how = data.draw(st.sampled_from(["cut", "flip", "random"]))
    if how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "flip":
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = bytearray(data.draw(st.binary(max_size=100)))
    file.write_bytes(content)
    try:
        verdict = verify_shipped(find_shipped(adapter))
        assert file.name == CHECKSUMS or verdict.faults
        (adapter / CHECKSUMS).unlink()
        assert isinstance(verify_shipped(find_shipped(adapter)).describe()["ok"], bool)
    finally:
        for path, before in whole.items():
            path.write_bytes(before)
