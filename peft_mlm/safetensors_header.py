"""What a file of safetensors says it holds, checked before a byte of it is believed; and its values, without torch.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length of the header, little-endian;
the header, a JSON object of name -> dtype, shape, data_offsets; then the values, in the order of their offsets, without
gaps. Every number in a header comes from a stranger: none is used as a size of memory before it is held against the
length of the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.errors import DamagedFileError

if TYPE_CHECKING:
    import numpy as np

LENGTH_BYTES = 8
# The format's own limit; json needs some ten times as much memory as the text.
LARGEST_HEADER = 100_000_000
LARGEST_SIZE = 2**63 - 1
MOST_DIMENSIONS = 64
METADATA = "__metadata__"
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# Types that have patterns of bits which are no number: (integer to read, bits to look at, what they are then). Infinity
# counts as none. IEEE 754; 8 bits: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.
NO_NUMBER: Mapping[str, tuple[str, int, int]] = {
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F32": ("<u4", 0x7F800000, 0x7F800000),
    "C64": ("<u4", 0x7F800000, 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000, 0x7FF0000000000000),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
}
READABLE: Mapping[str, str] = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "u1",
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
}  # fmt: skip
PIECE = 16 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it.

    Attributes:
        dtype: Its type, as safetensors names it (F32, BF16, ...).
        shape: Its sizes.
        start: First byte of its values, counted from the end of the header.
        stop: The byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A header that was found to be right.

    Attributes:
        path: The file.
        tensors: By name, in the order of their values in the file.
        metadata: What was written beside them.
        data_start: First byte of the values in the file.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def count(self) -> int:
        """How many values all tensors have."""
        return sum(tensor.count for tensor in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read the header of a file of safetensors, and check every statement in it against the file.

    Args:
        path: The file.

    Returns:
        Its tensors.

    Raises:
        DamagedFileError: It is no such file, is cut off, or its header contradicts itself; the message says in what.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedFileError(f"{path} is not a plain file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            _check_length(length, size, path)
            text = file.read(length)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        tensors, metadata = _entries(text)
        _check_layout(tensors, size - LENGTH_BYTES - length)
    except DamagedFileError as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error
    return Header(path, tensors, metadata, LENGTH_BYTES + length)


def read_values(header: Header, name: str) -> np.ndarray[Any, Any]:
    """Read one tensor.

    Args:
        header: Of its file.
        name: Its name.

    Returns:
        Its values, in its shape; bfloat16, which numpy does not have, as the float32 of the same values.

    Raises:
        DamagedFileError: The file was cut off meanwhile, or numpy has no such type (floats of 8 bits and fewer).
    """
    import numpy as np

    tensor = header.tensors[name]
    kind = READABLE.get(tensor.dtype)
    if kind is None and tensor.dtype != "BF16":
        raise DamagedFileError(f"{name} in {header.path} is of the type {tensor.dtype}, which is not read here.")
    content = b"".join(_pieces(header, tensor))
    if tensor.dtype == "BF16":
        values = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(content, kind)
    return values.reshape(tensor.shape)


def read_at(header: Header, name: str, places: Sequence[int]) -> list[float]:
    """Read a few values of a tensor, however large it is.

    Args:
        header: Of its file.
        name: Its name.
        places: Which values, counted as if it had one dimension.

    Returns:
        The values.

    Raises:
        DamagedFileError: As `read_values`.
    """
    tensor = header.tensors[name]
    size, values = BITS[tensor.dtype] // 8, []
    for place in places:
        start = tensor.start + place * size
        one = TensorEntry(tensor.dtype, (1,), start, start + size)
        values.append(float(read_values(replace(header, tensors={name: one}), name)[0]))
    return values


def count_no_numbers(header: Header, name: str) -> int:
    """Count the values of a tensor that are no finite number.

    Args:
        header: Of its file.
        name: Its name.

    Returns:
        How many are NaN or infinite. Read in pieces: memory does not grow with the tensor.
    """
    import numpy as np

    tensor = header.tensors[name]
    if tensor.dtype not in NO_NUMBER:
        return 0
    kind, mask, bits = NO_NUMBER[tensor.dtype]
    return sum(int(((np.frombuffer(piece, kind) & mask) == bits).sum()) for piece in _pieces(header, tensor))


def weight_files(folder: Path, name: str = "model") -> list[Path]:
    """List the files of safetensors that hold a model's weights: one, or the shards that an index names.

    Args:
        folder: The model's folder.
        name: First part of the file's name.

    Returns:
        The files, sorted; empty where there is none.

    Raises:
        DamagedFileError: The index is damaged, or names a file outside the folder or one that is not there.
    """
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        shards = {str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{index} is damaged: {type(error).__name__}.") from error
    for shard in sorted(shards):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise DamagedFileError(f"{index} names {shard[:100]!r}, which is no file of safetensors beside it.")
        if not (folder / shard).is_file():
            raise DamagedFileError(f"{index} names {shard}, which is not there.")
    return [folder / shard for shard in sorted(shards)]


def _pieces(header: Header, tensor: TensorEntry) -> Iterator[bytes]:
    try:
        with header.path.open("rb") as file:
            file.seek(header.data_start + tensor.start)
            left = tensor.stop - tensor.start
            while left:
                piece = file.read(min(left, PIECE))
                if len(piece) < min(left, PIECE):
                    raise DamagedFileError(f"{header.path} was cut off while it was read.")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise DamagedFileError(f"{header.path} cannot be read: {error.strerror or error}.") from error


def _check_length(length: int, size: int, path: Path) -> None:
    if size < LENGTH_BYTES:
        raise DamagedFileError(f"{path} is damaged: it has {size} bytes, too few for the length of a header.")
    if length > LARGEST_HEADER:
        raise DamagedFileError(
            f"{path} is damaged: it claims a header of {length} bytes; the most is {LARGEST_HEADER}."
        )
    if length > size - LENGTH_BYTES:
        raise DamagedFileError(
            f"{path} is damaged: it claims a header of {length} bytes, and {size - LENGTH_BYTES} bytes follow: it is "
            "cut off, or no file of safetensors."
        )


def _entries(text: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the JSON of a header; messages are parts of a sentence."""
    if not text.startswith(b"{"):
        raise DamagedFileError("its header does not begin with '{'")
    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        json.dumps([*record, record.get(METADATA)], ensure_ascii=False).encode()  # half a character fails here
    except DamagedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"its header is no JSON ({type(error).__name__})") from error
    metadata = record.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{METADATA} is not a table of texts")
    tensors = {name: _entry(name, entry) for name, entry in record.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))), metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DamagedFileError(f"its header has {_short(name)} twice")
    return record


def _entry(name: str, entry: Any) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"{_short(name)} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise DamagedFileError(f"{_short(name)} is of the unknown type {_short(dtype)}")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise DamagedFileError(f"{_short(name)} has the shape {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise DamagedFileError(f"{_short(name)} has the data_offsets {_short(offsets)}")
    count = 1
    for size in shape:  # as the library multiplies: what overflows its integers is refused, even before a zero
        count *= size
        if count > LARGEST_SIZE:
            raise DamagedFileError(f"{_short(name)} has the shape {_short(shape)}: more values than can be counted")
    bits = count * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise DamagedFileError(
            f"{_short(name)} of the type {dtype} and shape {_short(shape)} cannot lie in "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in value)


def _check_layout(tensors: Mapping[str, TensorEntry], length: int) -> None:
    """See to it that the values lie side by side, each byte belonging to one tensor."""
    end = 0
    for name, tensor in tensors.items():
        if tensor.stop > length:
            raise DamagedFileError(
                f"{_short(name)} ends at byte {tensor.stop} of the values, and there are {length}: the file is cut off"
            )
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise DamagedFileError(f"{_short(name)} {what} (at byte {tensor.start}, not {end})")
        end = tensor.stop
    if end != length:
        raise DamagedFileError(f"{length - end} bytes follow that belong to no tensor")


def _short(value: Any) -> str:
    """Show what a stranger wrote, in one short line."""
    text = str(value) if len(str(value)) <= 120 else f"{str(value)[:100]}..."
    return repr(text) if isinstance(value, str) else text.replace("\n", " ")
