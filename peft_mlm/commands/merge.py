"""`peft-mlm merge`: base + adapter -> one plain transformers model, compared with what was trained."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mlm.console import bytes_text, print_table
from peft_mlm.errors import AdapterError, RunFolderError

logger = logging.getLogger(__name__)


def merge(
    name_or_path: str, output_dir: str | Path, *, base: str | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Merge an adapter into its base.

    Args:
        name_or_path: A run folder, or an adapter (a folder or a hub name).
        output_dir: Folder to make; it must not exist, or be empty.
        base: Base model, if it is not the recorded one.
        dtype: Type of the merged weights: float32, bfloat16 or float16. The sum itself is made in float32.

    Returns:
        `output_dir`, `bytes`, and what the comparison with base + adapter gave: `max_abs_logit_diff`,
        `max_abs_logit_diff_as_run`, `max_abs_logit`, `top1_agreement`, `positions`, `tied`, `dtype`, `compared_in`.

    Raises:
        AdapterError: There is no adapter, or it does not fit.
        MergeError: The merged model is not what was trained; nothing is written then.
        RunFolderError: `output_dir` is not empty.
    """
    from peft_mlm.loading import load_target, resolve_target
    from peft_mlm.merging import merge_adapter
    from peft_mlm.run_folder import folder_bytes

    output = Path(output_dir).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(
            f"output_dir {output} is not empty, and nothing in it is overwritten. Give another folder."
        )
    target = resolve_target(name_or_path, base=base)
    if target.adapter is None:
        raise AdapterError(f"{name_or_path} is a model without an adapter: there is nothing to merge.")
    loaded = load_target(replace(target, base=replace(target.base, dtype="float32")))
    report = merge_adapter(loaded.model, loaded.tokenizer, output, dtype=dtype)
    return {"output_dir": str(output), "bytes": folder_bytes(output), **report.describe()}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().parse_args(words)
    return merge(given.adapter, given.output_dir, base=given.base, dtype=given.dtype)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        ["written to", record["output_dir"]],
        ["size", bytes_text(record["bytes"])],
        ["largest difference of a logit", record["max_abs_logit_diff"]],
        ["same most probable token", f"{record['top1_agreement']:.2%} of {record['positions']:,} positions"],
    ]
    print_table("merged", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm merge --help`."""
    return _parser().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peft-mlm merge", description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("adapter", help="run folder, or an adapter's folder or hub name")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
