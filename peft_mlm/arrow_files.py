"""Tables that are written while they are made, beside the tables they are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter


def written_beside(
    source: Dataset,
    fingerprint: str,
    features: Features,
    write: Callable[[ArrowWriter], None],
    *,
    reuse: bool = False,
) -> Dataset:
    """Write a table into a file beside a data set's own, or into memory where that has none.

    Args:
        source: The data set that the table is made of.
        fingerprint: Names the result.
        features: Its columns.
        write: Writes the rows; what it raises leaves no file.
        reuse: Whether a file of this fingerprint is taken as it is. Default False.

    Returns:
        The data set; a file is memory-mapped.
    """
    if not source.cache_files:
        buffer = pa.BufferOutputStream()
        with ArrowWriter(features=features, stream=buffer, fingerprint=fingerprint) as writer:
            write(writer)
            writer.finalize(close_stream=False)
        return Dataset.from_buffer(buffer.getvalue(), split=source.split)
    # A name that Dataset.cleanup_cache_files() knows.
    path = Path(source.cache_files[0]["filename"]).with_name(f"cache-{fingerprint}.arrow")
    if not (reuse and path.is_file()):
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with (
                unfinished.open("wb") as file,
                ArrowWriter(features=features, stream=file, fingerprint=fingerprint) as writer,
            ):
                write(writer)
                writer.finalize(close_stream=False)
            unfinished.replace(path)  # whoever reads an older file of this name goes on reading that
        finally:
            unfinished.unlink(missing_ok=True)
    return Dataset.from_file(str(path), split=source.split)
