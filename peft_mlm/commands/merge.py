"""`peft-mlm merge`: base + adapter -> one plain transformers model, compared with what was trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import AdapterError, ArgumentsError, RunFolderError
from peft_mlm.model_checks import check_path
from peft_mlm.run_folder import check_output_dir, folder_bytes

DTYPES = ("float32", "bfloat16", "float16")


def merge(
    name_or_path: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    any_base: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Merge an adapter into its base.

    Args:
        name_or_path: A run folder, or an adapter (a folder or a hub name).
        output_dir: Folder to make; it must not exist, or be empty.
        base: Base model, if it is not the recorded one.
        any_base: Merge into a base with other weights than the adapter was trained on.
        dtype: Type of the merged weights: float32, bfloat16 or float16. The sum itself is made in float32.

    Returns:
        `output_dir`, `bytes`, and what the comparison with base + adapter gave: `max_abs_logit_diff`,
        `max_abs_logit_diff_as_run`, `max_abs_logit`, `top1_agreement`, `positions`, `tied`, `dtype`, `compared_in`,
        `max_abs_logit_diff_quantised`. A quantised base is dequantised: the merged model is float.

    Raises:
        AdapterError: There is no adapter, or it does not fit.
        ArgumentsError: There is no such `dtype`.
        MergeError: The merged model is not what was trained; nothing is written then.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    if dtype not in DTYPES:
        raise ArgumentsError(f"dtype is {dtype!r}: choose {', '.join(DTYPES)}.")
    output = Path(output_dir).expanduser()
    _check_output(output)
    check_path(name_or_path)

    from peft_mlm.loading import load_target, resolve_target
    from peft_mlm.merging import merge_adapter, probe_logits
    from peft_mlm.quantization import is_quantised

    target = resolve_target(name_or_path, base=base)
    if target.adapter is None:
        raise AdapterError(
            f"There is nothing to merge: {name_or_path} is no adapter, and no run with one. Give a folder, or a hub "
            "name, that holds adapter_config.json."
        )
    exact = replace(target, base=replace(target.base, dtype="float32"))
    loaded, quantised = load_target(exact, any_base=any_base), None
    if is_quantised(loaded.model):
        as_run = loaded if target.base.dtype == "float32" else load_target(target, any_base=any_base)
        quantised = probe_logits(as_run.model, as_run.tokenizer)
        loaded = load_target(exact, any_base=any_base, dequantised=True)
    # Resolved: the folder is replaced as a whole, which a link cannot be.
    report = merge_adapter(loaded.model, loaded.tokenizer, output.resolve(), dtype=dtype, quantised=quantised)
    return {"output_dir": str(output), "bytes": folder_bytes(output), **report.describe()}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return merge(given.adapter, given.output_dir, base=given.base, any_base=given.any_base, dtype=given.dtype)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        ["written to", record["output_dir"]],
        ["size", bytes_text(record["bytes"])],
        ["largest difference of a logit", record["max_abs_logit_diff"]],
        ["same most probable token", f"{record['top1_agreement']:.2%} of {record['positions']:,} positions"],
    ]
    if record["max_abs_logit_diff_quantised"] is not None:
        rows.append(["largest difference from the quantised run", record["max_abs_logit_diff_quantised"]])
    print_table("merged", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm merge --help`."""
    return _parser().format_help()


def _check_output(path: Path) -> None:
    check_output_dir(path, resume=False)
    if path.is_dir() and path.samefile(Path.cwd()):
        raise RunFolderError(f"output_dir {path} is the folder you are in. Give a new one.")
    beside = path.resolve().parent  # where the model is written before it takes its place
    if beside.exists() and not os.access(beside, os.W_OK):
        raise RunFolderError(f"output_dir {path} cannot be made: no permission to write in {beside}.")


def _parser() -> CommandParser:
    parser = CommandParser("merge", __doc__)
    parser.add_argument("adapter", help="run folder, or an adapter's folder or hub name")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
