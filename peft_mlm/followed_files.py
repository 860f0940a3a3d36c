"""Files that two threads follow while they are written: one hashes them, the other brings them to the disk.

To do so when a large file is complete would take as long again as writing it. The threads read the bytes from the page
cache, so that nothing is kept in memory for them.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

# A file is hashed in steps of this many bytes, read in pieces of so many, and brought to the disk at these.
STEP, PIECE, SYNC = 32 * 2**20, 2**20, 256 * 2**20


class FollowedFiles:
    """A context; when it is left, the files that were written in it are on the disk, and `sums` has their SHA-256."""

    def __init__(self) -> None:
        self.sums: dict[Path, str] = {}
        self._digests: dict[Path, Any] = {}
        self._followed: dict[Path, int] = {}
        self._hashing, self._disk = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._work: list[Future[None]] = []

    def __enter__(self) -> FollowedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for thread in (self._hashing, self._disk):
            thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for work in self._work:
                work.result()  # raises what a thread met, such as a disk that is full
            self.sums |= {file: digest.hexdigest() for file, digest in self._digests.items()}

    def grown(self, file: Path, size: int, *, complete: bool = False) -> None:
        """Tell that a file has grown.

        Args:
            file: It is written from its start to its end, and its first `size` bytes no longer change.
            size: Its bytes.
            complete: Whether these are all of it.
        """
        seen = self._followed.setdefault(file, 0)
        if size - seen >= STEP or complete:
            self._followed[file] = size
            self._work.append(self._hashing.submit(self._hash, file, seen, size))
            if size // SYNC > seen // SYNC or complete:
                self._work.append(self._disk.submit(_sync, file))

    def _hash(self, file: Path, start: int, end: int) -> None:
        digest = self._digests.setdefault(file, hashlib.sha256())
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            for place in range(start, end, PIECE):
                digest.update(stream.read(min(PIECE, end - place)))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
