"""safetensors files taken apart and put together without holding them: what is unchanged is copied from file to file.

The safetensors library writes only tensors that are all in memory. A file is 8 bytes with the length of its header, the
header (JSON: type, shape and place of each tensor), and the tensors' bytes without gaps.
Format: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from peft_mlm.errors import DamagedFileError, ModelError
from peft_mlm.followed_files import FollowedFiles
from peft_mlm.safetensors_header import read_header

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES_OF_TYPES = {dtype: name for name, dtype in TYPES.items()}
BUFFER = 8 * 2**20
# Copied within the kernel at a time.
PIECE = 32 * 2**20
# Numbers in a block of rows: small enough to stay in a core's cache while something is done with them.
BLOCK = 2**18
# What the system says where two files cannot be copied within the kernel: the bytes then go through memory.
NO_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its name there.
        dtype: Its type, as safetensors writes it ("F32").
        shape: Its shape.
        file: The file.
        start: Its first byte in the file.
        size: Its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Part:
    """A tensor to write.

    Attributes:
        name: Its name in the new file.
        dtype: Its type there.
        shape: Its shape.
        source: Where its bytes are copied from; or what makes its values when its turn comes, in blocks of rows.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | Callable[[], Iterable[torch.Tensor]]


def stored_tensors(file: Path) -> list[StoredTensor]:
    """List what lies in a file.

    Args:
        file: A safetensors file.

    Returns:
        Its tensors, in the order of their bytes.

    Raises:
        ModelError: It is damaged.
    """
    try:
        header = read_header(file)
    except DamagedFileError as error:
        raise ModelError(f"{file.name} cannot be read as safetensors: {error} Get the file again.") from error
    return [
        StoredTensor(name, entry.dtype, entry.shape, file, header.data_start + entry.start, entry.stop - entry.start)
        for name, entry in header.tensors.items()
    ]


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor into memory of its own; nothing of the file stays mapped.

    Args:
        tensor: From `stored_tensors`.

    Returns:
        Its values, in its own type.
    """
    raw = torch.empty(tensor.size, dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as stream:
        _read_into(stream.fileno(), _view(raw), tensor.start)
    return raw.view(TYPES[tensor.dtype]).reshape(tensor.shape)


def read_blocks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """Read a tensor some rows at a time.

    Args:
        tensor: From `stored_tensors`.

    Yields:
        Rows of it (all of a vector), in their order; the memory is that of the next ones.
    """
    dtype = TYPES[tensor.dtype]
    whole = len(tensor.shape) < 2 or not tensor.size
    row_size = tensor.size if whole else tensor.size // tensor.shape[0]
    rows = 1 if whole else max(1, BLOCK * dtype.itemsize // row_size)
    raw = torch.empty(rows * row_size, dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as stream:
        for start in range(0, max(tensor.size, 1), max(len(raw), 1)):
            piece = raw[: min(len(raw), tensor.size - start)]
            _read_into(stream.fileno(), _view(piece), tensor.start + start)
            yield piece.view(dtype).reshape(tensor.shape if whole else (-1, *tensor.shape[1:]))


def read_values(tensor: StoredTensor, places: Sequence[int]) -> list[float]:
    """Read single numbers of a tensor.

    Args:
        tensor: From `stored_tensors`.
        places: Their places in the tensor, laid out flat.

    Returns:
        The numbers.
    """
    dtype = TYPES[tensor.dtype]
    raw = torch.empty(len(places) * dtype.itemsize, dtype=torch.uint8)
    view = _view(raw)
    with tensor.file.open("rb", buffering=0) as stream:
        for number, place in enumerate(places):
            piece = view[number * dtype.itemsize : (number + 1) * dtype.itemsize]
            _read_into(stream.fileno(), piece, tensor.start + place * dtype.itemsize)
    return [float(value) for value in raw.view(dtype).tolist()]


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Tell whether two tensors are the same, byte by byte, with little memory."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        for offset in range(0, one.size, BUFFER):
            count = min(BUFFER, one.size - offset)
            pieces = bytearray(count), bytearray(count)
            _read_into(first.fileno(), memoryview(pieces[0]), one.start + offset)
            _read_into(second.fileno(), memoryview(pieces[1]), other.start + offset)
            if pieces[0] != pieces[1]:
                return False
    return True


def write_tensors(file: Path, parts: Sequence[Part], followed: FollowedFiles) -> None:
    """Write a safetensors file, one tensor after the other.

    Args:
        file: The new file.
        parts: What it is to hold. Wider types come first, as the format wants its numbers aligned.
        followed: Is told how far it is written.
    """
    ordered = sorted(parts, key=lambda part: -part.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in ordered:
        start, end = end, end + _size(part)
        row = {"dtype": NAMES_OF_TYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
        header[part.name] = row
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        _write(out, memoryview(len(text).to_bytes(8, "little") + text))
        for run in _runs(ordered):
            for _ in _copy(run, out) if isinstance(run, StoredTensor) else _write_blocks(run, out):
                followed.grown(file, out.tell())
        followed.grown(file, out.tell(), complete=True)


def _size(part: Part) -> int:
    count = part.dtype.itemsize
    for length in part.shape:
        count *= length
    return count


def _runs(parts: Sequence[Part]) -> Iterator[StoredTensor | Part]:
    """Join tensors that lie side by side in their file, so that they are copied in one piece."""
    run: StoredTensor | None = None
    for part in parts:
        source = part.source
        if isinstance(source, StoredTensor) and run and (source.file, source.start) == (run.file, run.start + run.size):
            run = StoredTensor(run.name, run.dtype, (), run.file, run.start, run.size + source.size)
            continue
        if run:
            yield run
        run = source if isinstance(source, StoredTensor) else None
        if run is None:
            yield part
    if run:
        yield run


def _write_blocks(part: Part, out: BinaryIO) -> Iterator[None]:
    """Write what is made for a tensor, block by block."""
    assert not isinstance(part.source, StoredTensor)
    left = _size(part)
    for block in part.source():
        data = _view(block.to(part.dtype).contiguous().reshape(-1).view(torch.uint8))
        left -= len(data)
        _write(out, data)
        yield
    if left:
        raise ValueError(f"{part.name} was not made in its shape {part.shape}: {left} bytes are left")


def _view(raw: torch.Tensor) -> memoryview:
    """Give the memory of a tensor of bytes."""
    array: Any = raw.numpy()
    return memoryview(array)


def _copy(source: StoredTensor, out: BinaryIO) -> Iterator[None]:
    """Copy bytes from file to file, piece by piece: within the kernel, or through a small buffer where it cannot."""
    place, left = source.start, source.size
    with source.file.open("rb", buffering=0) as stream:
        while left and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(stream.fileno(), out.fileno(), min(left, PIECE), offset_src=place)
            except OSError as error:
                if error.errno not in NO_COPY:
                    raise
                break
            if not copied:
                break
            place, left = place + copied, left - copied
            yield
        while left:
            piece = memoryview(bytearray(min(BUFFER, left)))
            _read_into(stream.fileno(), piece, place)
            _write(out, piece)
            place, left = place + len(piece), left - len(piece)
            yield


def _read_into(descriptor: int, target: memoryview, place: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], place + done)
        if not count:
            raise OSError(errno.EIO, "the file ends before its tensors do")
        done += count


def _write(out: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += out.write(data[done:])
