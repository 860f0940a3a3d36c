"""`peft-mlm merge`: base + adapter -> one plain transformers model, compared with what was trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.argument_types import convert, parse_type
from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import AdapterError, ArgumentsError
from peft_mlm.model_checks import check_path
from peft_mlm.run_folder import check_new_folder, describe_environment, folder_bytes, read_json

if TYPE_CHECKING:
    from peft_mlm.loading import Loaded, Prepared, Target
    from peft_mlm.model import Base

DTYPES = ("float32", "bfloat16", "float16", "auto")
INTO = ("dequantised", "original")


def merge(
    name_or_path: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    any_base: bool = False,
    dtype: str = "float32",
    into: str | None = None,
    proof: bool = True,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge an adapter into its base.

    Args:
        name_or_path: A run folder, or an adapter (a folder or a hub name).
        output_dir: Folder to make; it must not exist, or be empty.
        base: Base model, if it is not the recorded one.
        any_base: Merge into a base with other weights than the adapter was trained on.
        dtype: Type of the merged weights: float32, bfloat16, float16, or auto, as the base's file has them. The sum
            itself is made in float32 or better.
        into: Of an adapter that was trained on a quantised base: "dequantised" (default), the weights it was trained
            on, or "original", the float weights that were quantised, which is another model; the report says by how
            much.
        proof: Whether to load the merged model afresh and compare it. Without it nothing large is held in memory where
            the adapter can be merged file by file.
        flags: Words of a command line that say on which text to compare: `--validation_file` and `--max_eval_samples`.
            A run's own evaluation text is used by itself.

    Returns:
        `output_dir`, `bytes`, and what stands in merge_report.json (docs/json.md).

    Raises:
        AdapterError: There is no adapter, or it does not fit.
        ArgumentsError: There is no such `dtype` or `into`, or the flags are wrong.
        MergeError: The merged model is not what was trained; nothing is written then.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    _check_choices(dtype, into)
    output = Path(output_dir).expanduser()
    check_new_folder(output)
    check_path(name_or_path)

    from peft_mlm.loading import check_base, prepare_adapter, resolve_target
    from peft_mlm.merging import REPORT, built_merge, write_merged
    from peft_mlm.stream_plan import plan_stream, stored_type
    from peft_mlm.streaming_merge import streamed_merge

    target = resolve_target(name_or_path, base=base)
    if target.adapter is None:
        raise AdapterError(
            f"There is nothing to merge: {name_or_path} is no adapter, and no run with one. Give a folder, or a hub "
            "name, that holds adapter_config.json."
        )
    _check_text(target, flags)
    prepared = prepare_adapter(target, original=into == "original")
    into = _resolve_into(into, target, prepared)
    dtype = stored_type(prepared.arguments) if dtype == "auto" else dtype
    plan = plan_stream(target.adapter, prepared.arguments, prepared.outline)
    expected = None
    if isinstance(plan, str):
        loaded, expected = _load(target, any_base, into, flags if proof else None)
        writer, used = built_merge(loaded.model, dtype), loaded.base
    else:
        check_base(target.adapter, plan.base, any_base=any_base)
        if proof:
            _, expected = _load(target, any_base, into, flags)
        writer, used = streamed_merge(plan, dtype), plan.base
    # Resolved: the folder is replaced as a whole, which a link cannot be.
    details = {"into": into, "built_because": plan if isinstance(plan, str) else None, **_describe(used)}
    options = {"dtype": dtype, "expected": expected, "details": details, "adapter": target.adapter}
    write_merged(output.resolve(), writer, used.tokenizer, **options)  # type: ignore[arg-type]
    return {"output_dir": str(output), "bytes": folder_bytes(output), **read_json(output / REPORT)}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    text = (("--validation_file", given.validation_file), ("--max_eval_samples", given.max_eval_samples))
    flags = [word for flag, value in text if value is not None for word in (flag, value)]
    names = ("base", "any_base", "dtype", "into", "proof")
    return merge(given.adapter, given.output_dir, **{name: getattr(given, name) for name in names}, flags=flags)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [["written to", record["output_dir"]], ["size", bytes_text(record["bytes"])]]
    if not record["proved"]:
        rows.append(["compared with base + adapter", "no (--proof false)"])
    else:
        rows += [
            ["largest difference of a logit", record["max_abs_logit_diff"]],
            ["same most probable token", f"{record['top1_agreement']:.2%} of {record['positions']:,} positions"],
        ]
        if record["max_abs_logit_diff_quantised"] is not None:
            rows.append(["largest difference from the quantised run", record["max_abs_logit_diff_quantised"]])
        if record["text"] is not None:
            parts = [part for part in ("quantised", "adapter", "merged") if record["text"][part] is not None]
            rows += [[f"perplexity on text, {part}", record["text"][part]["perplexity"]] for part in parts]
    print_table("merged", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm merge --help`."""
    return _parser().format_help()


def _load(target: Target, any_base: bool, into: str | None, flags: Sequence[str] | None) -> tuple[Loaded, Any]:
    """Load base + adapter in float32, and see what they give on the rows of the proof; not if flags is None."""
    from peft_mlm.loading import load_target
    from peft_mlm.merge_proof import observe
    from peft_mlm.merging import expect
    from peft_mlm.proof_text import proof_rows

    rows = as_run = None
    if into is not None and flags is not None:
        quantised = load_target(target, any_base=any_base)
        rows = proof_rows(quantised, target.run, flags)
        as_run = observe(quantised.model, rows, precise=None)
        del quantised
    exact = replace(target, base=replace(target.base, dtype="float32"))
    loaded = load_target(exact, any_base=any_base, dequantised=into == "dequantised", original=into == "original")
    if flags is None:
        return loaded, None
    rows = rows or proof_rows(loaded, target.run, flags)
    return loaded, expect(loaded.model, rows, quantised=as_run)


def _describe(base: Base) -> dict[str, Any]:
    """Say which base was merged into, and by which versions."""
    from peft_mlm.fingerprint import digest
    from peft_mlm.model import published_name

    return {
        "base": published_name(base.name_or_path),
        "base_revision": base.revision,
        "base_fingerprint": digest(base.fingerprint),
        "versions": describe_environment("cpu")["versions"],
    }


def _resolve_into(into: str | None, target: Target, prepared: Prepared) -> str | None:
    """Choose the weights to merge into; None where the base is float and there is one choice."""
    from peft_mlm.loading import prepare_adapter

    if into is None:
        return "dequantised" if prepared.quantised else None
    if not prepare_adapter(target).quantised:
        raise ArgumentsError(f"into {into}: this adapter was trained on a float base; leave --into out.")
    if into == "original" and prepared.quantised:
        raise ArgumentsError(
            f"into original: {prepared.arguments.model_name_or_path} holds quantised weights alone. Leave --into out."
        )
    return into


def _check_text(target: Target, flags: Sequence[str]) -> None:
    if not flags:
        return
    if target.run is None and "--validation_file" not in flags:
        raise ArgumentsError("max_eval_samples: of which text? This adapter is of no run: give --validation_file.")
    if "--validation_file" in flags:
        from peft_mlm.config import read_arguments
        from peft_mlm.text_files import find_files

        find_files(read_arguments(None, flags, for_training=False).data.validation_file or ())


def _check_choices(dtype: str, into: str | None) -> None:
    if dtype not in DTYPES:
        raise ArgumentsError(f"dtype is {dtype!r}: choose {', '.join(DTYPES)}.")
    if into is not None and into not in INTO:
        raise ArgumentsError(f"into is {into!r}: choose {' or '.join(INTO)}.")


def _parser() -> CommandParser:
    def truth(word: str) -> bool:
        return bool(convert(word, parse_type("bool")))

    parser = CommandParser("merge", __doc__)
    parser.add_argument("adapter", help="run folder, or an adapter's folder or hub name")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights (default float32); auto: the base's"
    )
    parser.add_argument(
        "--into", choices=INTO, help="of a quantised base, the weights to merge into (default dequantised)"
    )
    parser.add_argument("--validation_file", help="text to compare on, in place of the run's own")
    parser.add_argument("--max_eval_samples", help="rows of that text (default 64)")
    parser.add_argument(
        "--proof", type=truth, nargs="?", const=True, default=True, help="compare with base + adapter (default true)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
