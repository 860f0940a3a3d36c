"""safetensors files written tensor by tensor are the library's, and what is copied is copied exactly."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_mlm import tensor_files
from peft_mlm.errors import ModelError
from peft_mlm.followed_files import FollowedFiles
from peft_mlm.tensor_files import (
    TYPES,
    Part,
    StoredTensor,
    read_blocks,
    read_tensor,
    read_values,
    same_bytes,
    stored_tensors,
)


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: (torch.randn(7, 5) * 50).to(dtype) for name, dtype in TYPES.items()}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "vector": torch.arange(11.0)}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    save_file(example(), tmp_path / "some.safetensors", metadata={"format": "pt"})
    return {tensor.name: tensor for tensor in stored_tensors(tmp_path / "some.safetensors")}


def write_tensors(file: Path, parts: list[Part]) -> None:
    with FollowedFiles() as followed:
        tensor_files.write_tensors(file, parts, followed)
    assert followed.sums == {file: hashlib.sha256(file.read_bytes()).hexdigest()}


def part(tensor: StoredTensor) -> Part:
    return Part(tensor.name, TYPES[tensor.dtype], tensor.shape, tensor)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def test_what_the_library_wrote_is_read_in_every_type_whole_in_blocks_and_number_by_number(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK", 11)  # two rows of five
    for name, tensor in example().items():
        assert same({name: read_tensor(stored[name])}, {name: tensor})
        blocks = [block.clone() for block in read_blocks(stored[name])]
        assert same({name: torch.cat(blocks) if tensor.dim() else blocks[0]}, {name: tensor})
        if tensor.dim() == 2 and tensor.numel():
            assert len(blocks) == 4
            assert read_values(stored[name], [0, 17, 34]) == [float(tensor.flatten()[i]) for i in (0, 17, 34)]


@pytest.mark.parametrize("within_the_kernel", [True, False])
def test_the_library_reads_what_is_copied_and_made(
    stored: dict[str, StoredTensor], tmp_path: Path, within_the_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not within_the_kernel:

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise OSError(errno.EXDEV, "two file systems")

        monkeypatch.setattr(os, "copy_file_range", refuse)
        monkeypatch.setattr(tensor_files, "BUFFER", 64)
    kept = [part(tensor) for name, tensor in stored.items() if name not in ("F32", "BF16")]
    made = Part("F32", torch.float16, (7, 5), lambda: [example()["F32"][:3], example()["F32"][3:]])
    renamed = Part("other name", torch.bfloat16, (7, 5), stored["BF16"])
    write_tensors(tmp_path / "new.safetensors", [*kept[:4], made, *kept[4:], renamed])
    expected = example()
    expected |= {"F32": expected["F32"].half(), "other name": expected.pop("BF16")}
    assert same(load_file(tmp_path / "new.safetensors"), expected)


def test_a_copy_of_all_is_the_library_s_file_in_one_piece(stored: dict[str, StoredTensor], tmp_path: Path) -> None:
    write_tensors(tmp_path / "copy.safetensors", [part(tensor) for tensor in stored.values()])
    file = next(iter(stored.values())).file
    assert file.stat().st_size == (tmp_path / "copy.safetensors").stat().st_size
    runs = list(tensor_files._runs([part(tensor) for tensor in stored.values()]))
    assert len(runs) == 1


def test_a_tensor_of_another_size_than_was_told_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 bytes are left"):
        write_tensors(tmp_path / "x", [Part("a", torch.float32, (4,), lambda: [torch.zeros(2)])])


def test_two_tensors_are_compared_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "BUFFER", 16)
    one, other = torch.zeros(100), torch.zeros(100)
    other[99] = 1
    save_file({"a": one, "b": one.clone(), "c": other, "d": one.half()}, tmp_path / "t.safetensors")
    a, b, c, d = sorted(stored_tensors(tmp_path / "t.safetensors"), key=lambda tensor: tensor.name)
    assert same_bytes(a, b)
    assert not same_bytes(a, c)
    assert not same_bytes(a, d)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_refused_by_its_name_alone(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(example(), file)
    content = {"cut": file.read_bytes()[:-9], "text": b"{}" * 100, "empty": b""}[damage]
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"^model\.safetensors cannot be read"):
        stored_tensors(file)
