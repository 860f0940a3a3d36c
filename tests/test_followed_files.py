"""Files that are followed while they grow have the sums that they have when they are complete."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from peft_mlm import followed_files
from peft_mlm.followed_files import FollowedFiles


def write(file: Path, pieces: list[bytes], followed: FollowedFiles) -> None:
    with file.open("wb", buffering=0) as out:
        for piece in pieces:
            out.write(piece)
            followed.grown(file, out.tell())
        followed.grown(file, out.tell(), complete=True)


@pytest.mark.parametrize("lengths", [[], [1], [10, 1, 7], [300] * 7, [1000]])
def test_the_sums_are_those_of_the_files_however_they_grow(
    lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_files, "STEP", 64)
    monkeypatch.setattr(followed_files, "PIECE", 48)
    with FollowedFiles() as followed:
        for number in range(3):
            write(tmp_path / str(number), [os.urandom(length) for length in lengths], followed)
    assert followed.sums == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    assert len(followed.sums) == 3


def test_what_a_thread_meets_is_raised_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"), FollowedFiles() as followed:
        write(tmp_path / "file", [b"bytes"], followed)


def test_an_error_in_the_block_is_the_one_that_is_raised(tmp_path: Path) -> None:
    def stopped() -> None:
        with FollowedFiles() as followed:
            followed.grown(tmp_path / "no such file", 1, complete=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
