"""Headers of safetensors: what the library reads is read the same, what it refuses is refused, nothing crashes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_mlm.errors import DamagedFileError
from peft_mlm.safetensors_header import BITS, count_no_numbers, read_at, read_header, read_values, weight_files

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bf16": torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16),
    "c.half": torch.tensor([[0.5]], dtype=torch.float16),
    "d.empty": torch.zeros(0, 4),
    "e.scalar": torch.tensor(7.0, dtype=torch.float64),
    "f.ints": torch.tensor([-1, 2], dtype=torch.int64),
    "g.bool": torch.tensor([True, False]),
}
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pack(header: Any, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def library_reads(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_names_shapes_and_values_are_those_that_were_saved(saved: Path) -> None:
    header = read_header(saved)
    assert header.metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert header.count == sum(tensor.numel() for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        values = read_values(header, name)
        assert values.shape == tuple(tensor.shape)
        places = range(tensor.numel())
        assert read_at(header, name, places) == tensor.double().flatten().tolist()
        np.testing.assert_array_equal(values, tensor.double().numpy().astype(values.dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
)  # fmt: skip
def test_values_that_are_no_number_are_counted_as_torch_counts_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """All patterns of bits of the small types; some of the large ones."""
    bits = torch.finfo(dtype).bits
    if bits <= 16:
        raw = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
        values = raw.view(dtype)
    else:
        values = torch.tensor([0.0, -1.0, float("nan"), float("inf"), -float("inf"), 3e38], dtype=dtype)
    save_file({"x": values}, tmp_path / "x.safetensors")
    expected = int((~torch.isfinite(values.float() if bits < 32 else values)).sum())
    assert expected > 0
    assert count_no_numbers(read_header(tmp_path / "x.safetensors"), "x") == expected


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_each_type_has_the_size_that_the_library_gives_it(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"x": entry(dtype, (8,), (0, BITS[dtype]))}, bytes(BITS[dtype])))
    assert library_reads(path)
    assert count_no_numbers(read_header(path), "x") == 0


HOSTILE = {
    "empty": (b"", "0 bytes, too few"),
    "seven bytes": (b"1234567", "7 bytes, too few"),
    "a header of 2^60 bytes": (struct.pack("<Q", 2**60) + b"{}", f"claims a header of {2**60} bytes; the most is"),
    "longer than the file": (struct.pack("<Q", 10_000) + b"{}", "claims a header of 10000 bytes, and 2 bytes follow"),
    "no JSON": (pack(b"{nonsense}"), "is no JSON"),
    "no table": (pack(b"[1, 2]"), "does not begin with '{'"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "is no JSON"),
    "half a character": (pack(b'{"\\ud800": 1}'), "is no JSON"),
    "nested 100,000 deep": (pack(b'{"a":' * 100_000), "is no JSON"),
    "a number of 5,000 digits": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "is no JSON"),
    "a name twice": (pack(b'{"x": 1, "x": 2}'), "has 'x' twice"),
    "a key too many": (pack({"x": entry(code="x")}, bytes(4)), "not described by dtype, shape and data_offsets alone"),
    "no entry": (pack({"x": 5}), "not described by dtype"),
    "unknown type": (pack({"x": entry("F31")}, bytes(4)), "unknown type 'F31'"),
    "a list for a type": (pack({"x": {**entry(), "dtype": []}}, bytes(4)), "unknown type"),
    "a negative size": (pack({"x": entry(shape=(-1,))}, bytes(4)), "has the shape [-1]"),
    "a size that is true": (pack({"x": entry(shape=(True,))}, bytes(4)), "has the shape [True]"),
    "a size of 2^60": (pack({"x": entry(shape=(2**60,))}, bytes(4)), "cannot lie in 4 bytes"),
    "a product that overflows": (pack({"x": entry(shape=(2**62, 2**62))}, bytes(4)), "more values than can be counted"),
    "an overflow to zero": (pack({"x": entry(shape=(2**62, 4, 0), offsets=(0, 0))}), "more values than can be counted"),
    "offsets backwards": (pack({"x": entry(offsets=(4, 0))}, bytes(4)), "data_offsets [4, 0]"),
    "three offsets": (pack({"x": entry(offsets=(0, 4, 8))}, bytes(4)), "data_offsets [0, 4, 8]"),
    "beyond the file": (pack({"x": entry(shape=(3,), offsets=(0, 12))}, bytes(4)), "the file is cut off"),
    "a gap": (pack({"x": entry(offsets=(4, 8))}, bytes(8)), "leaves a gap"),
    "overlapping": (pack({"x": entry(shape=(2,), offsets=(0, 8)), "y": entry(offsets=(4, 8))}, bytes(8)), "overlaps"),
    "bytes of nobody": (pack({"x": entry()}, bytes(9)), "5 bytes follow that belong to no tensor"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "is not a table of texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_header(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300
    if name not in ("a key too many", "a name twice"):
        assert not library_reads(path)


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.safetensors")  # opening it would wait for a writer for ever
    with pytest.raises(DamagedFileError, match="not a plain file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(DamagedFileError, match="cannot be read: No such file"):
        read_header(tmp_path / "y.safetensors")


def verdict(path: Path, content: bytes) -> bool:
    """Read all of a file; only `DamagedFileError` may come out, and what is taken the library takes too."""
    path.write_bytes(content)
    try:
        header = read_header(path)
        for name in header.tensors:
            count_no_numbers(header, name)
    except DamagedFileError:
        return False
    assert library_reads(path)
    return True


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_give_a_verdict(content: bytes, tmp_path: Path) -> None:
    verdict(tmp_path / "x.safetensors", content)


@FUZZ
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert verdict(tmp_path / "x.safetensors", whole)
    assert not verdict(tmp_path / "x.safetensors", whole[: data.draw(st.integers(0, len(whole) - 1))])


@FUZZ
@given(data=st.data())
def test_a_flipped_bit_gives_a_verdict(data: st.DataObject, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    content = bytearray((tmp_path / "whole.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    verdict(tmp_path / "x.safetensors", bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3) | st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)) | JSON,
        "shape": st.lists(st.integers(0, 3) | st.integers(0, 2**66), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 20) | st.integers(-5, 2**66), min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), length=st.integers(0, 24))
def test_any_header_gives_a_verdict(header: dict[str, Any], length: int, tmp_path: Path) -> None:
    verdict(tmp_path / "x.safetensors", pack(header, bytes(length)))


def test_shards_are_those_of_the_index_and_lie_beside_it(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("b.safetensors", "a.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / shard)
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for wrong, said in (
        ({"weight_map": {"x": "../secret.safetensors"}}, "no file of safetensors beside it"),
        ({"weight_map": {"x": "pickle.bin"}}, "no file of safetensors beside it"),
        ({"weight_map": {"x": "c.safetensors"}}, "which is not there"),
        ({"weight_map": 5}, "is damaged"),
        ([], "is damaged"),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(DamagedFileError, match=said):
            weight_files(tmp_path)
