"""`peft-mlm export`: a run, adapter or model -> the encoder alone, half-precision weights, ONNX, sentence-transformers.

An adapter is merged into its base first. What is written is loaded afresh and compared with what was exported.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.arguments import ModelArguments
from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import ArgumentsError, ModelError
from peft_mlm.run_folder import check_new_folder, folder_bytes, staged, write_json

if TYPE_CHECKING:
    from peft_mlm.model import Base

# Format -> packages that it needs beside the project's own; they are the extra of the same name.
FORMATS: dict[str, tuple[str, ...]] = {
    "safetensors": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "sentence_transformers": ("sentence_transformers",),
}
DTYPES = ("float32", "bfloat16", "float16")
POOLINGS = ("mean", "cls", "max")
REPORT = "export_report.json"


def export(
    name_or_path: str,
    output_dir: str | Path,
    *,
    format: str = "safetensors",
    encoder_only: bool = False,
    pooling: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> dict[str, Any]:
    """Write a model for use elsewhere.

    Args:
        name_or_path: A run folder, an adapter or a model (a folder or a hub name). An adapter is merged into its base.
        output_dir: Folder to make; it must not exist, or be empty.
        format: `safetensors`: a plain transformers folder. `onnx`: model.onnx with free batch and length, float32.
            `sentence_transformers`: the encoder with a pooling layer on it.
        encoder_only: Leave the masked LM head out; sentence_transformers always does.
        pooling: For sentence_transformers, how a text's vector comes from those of its tokens: mean (default), cls or
            max.
        dtype: Type of the weights: float32 (default), bfloat16 or float16.
        base: Base model of an adapter, if it is not the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.

    Returns:
        `output_dir`, `bytes`, `format`, `encoder_only`, `dtype`, `pooling`, `merge` (the report of the merge, or None),
        and what the comparison gave: `max_abs_diff`, `max_abs`; for safetensors and sentence_transformers `fresh`
        (weights that the file does not hold and that start at random, such as a pooler's); for sentence_transformers
        `dimension`, `max_seq_length`; for onnx `shapes`, `inputs`, `output`, `opset`, `external_data`.

    Raises:
        ArgumentsError: Options that do not go together, or a format whose packages are not installed.
        ModelError: The model has no masked LM head, and not the encoder alone is asked for.
        ExportError: What was written is another model; the folder is not made then.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    _check_options(format, encoder_only=encoder_only, pooling=pooling, dtype=dtype)
    output = Path(output_dir).expanduser()
    check_new_folder(output)
    from peft_mlm.loading import resolve_target

    encoder_only = encoder_only or format == "sentence_transformers"
    target = resolve_target(name_or_path, base=base)
    place = output.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as temporary:
        merged, source = None, replace(target.base, dtype="float32")
        if target.adapter is not None:
            from peft_mlm.commands.merge import merge

            merged = merge(name_or_path, Path(temporary) / "merged", base=base, any_base=any_base)
            source = ModelArguments(model_name_or_path=merged.pop("output_dir"))
        loaded = _load(source, encoder_only=encoder_only)
        with staged(place) as folder:
            report = {
                "format": format,
                "encoder_only": encoder_only,
                "dtype": dtype or "float32",
                "pooling": (pooling or "mean") if format == "sentence_transformers" else None,
                "merge": merged,
            }
            report |= _write(loaded, folder, report)
            write_json(folder / REPORT, report)
    return {"output_dir": str(output), "bytes": folder_bytes(output), **report}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return export(
        given.model,
        given.output_dir,
        format=given.format,
        encoder_only=given.encoder_only,
        pooling=given.pooling,
        dtype=given.dtype,
        base=given.base,
        any_base=given.any_base,
    )


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        ["written to", record["output_dir"]],
        ["size", bytes_text(record["bytes"])],
        ["holds", ("the encoder alone" if record["encoder_only"] else "encoder and head") + f", {record['dtype']}"],
        ["largest difference of an output", record["max_abs_diff"]],
        ["largest output", record["max_abs"]],
    ]
    if record["merge"] is not None:
        rows.append(["merged first; largest difference of a logit", record["merge"]["max_abs_logit_diff"]])
    if record["format"] == "onnx":
        rows.append(["inputs -> output", f"{', '.join(record['inputs'])} -> {record['output']}"])
    if record["format"] == "sentence_transformers":
        rows.append(["vectors", f"{record['dimension']} numbers, {record['pooling']} of at most "
                     f"{record['max_seq_length']} tokens"])  # fmt: skip
    if record.get("fresh"):
        rows.append(["not in it, starts at random when opened", ", ".join(record["fresh"])])
    print_table(f"exported as {record['format']}", None, rows, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm export --help`."""
    return _parser().format_help()


def _check_options(format: str, *, encoder_only: bool, pooling: str | None, dtype: str | None) -> None:
    faults = []
    for name, value, choices in (("format", format, FORMATS), ("pooling", pooling, POOLINGS), ("dtype", dtype, DTYPES)):
        if value is not None and value not in choices:
            faults.append(f"{name} is {value!r}: choose {', '.join(choices)}.")
    if pooling is not None and format != "sentence_transformers":
        faults.append(f"--pooling {pooling} is for --format sentence_transformers, not for {format}. Leave it out.")
    if dtype not in (None, "float32") and format == "onnx":
        faults.append(f"--dtype {dtype}: an ONNX file is written in float32. Leave it out, or export safetensors.")
    missing = [package for package in FORMATS.get(format, ()) if importlib.util.find_spec(package) is None]
    if missing:
        faults.append(
            f"--format {format} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install 'peft-mlm[{format.replace('_', '-')}]'."
        )
    if faults:
        raise ArgumentsError(faults)


def _load(source: ModelArguments, *, encoder_only: bool) -> Base:
    """Load a plain model in float32; a quantised checkpoint with the weights it computes with."""
    from peft_mlm.model import load_base
    from peft_mlm.quantization import dequantise, is_quantised

    loaded = load_base(source, may_grow=False)
    if loaded.fresh_parameters and not encoder_only:
        raise ModelError(
            f"{loaded.name_or_path} has no masked LM head of its own ({', '.join(loaded.fresh_parameters)} are not in "
            "it): its predictions would be random. Add --encoder_only to leave the head out, or train an adapter on it "
            "first; that trains a head too."
        )
    if is_quantised(loaded.model):
        dequantise(loaded.model)
    loaded.model.cpu()
    return loaded


def _write(loaded: Base, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from peft_mlm.exporting import write_safetensors, write_sentence_transformers

    if wanted["format"] == "onnx":
        from peft_mlm.onnx_export import write_onnx

        return write_onnx(loaded.model, loaded.tokenizer, folder, encoder_only=wanted["encoder_only"])
    if wanted["format"] == "sentence_transformers":
        return write_sentence_transformers(
            loaded.model, loaded.tokenizer, folder, pooling=wanted["pooling"], dtype=wanted["dtype"]
        )
    return write_safetensors(
        loaded.model, loaded.tokenizer, folder, encoder_only=wanted["encoder_only"], dtype=wanted["dtype"]
    )


def _parser() -> CommandParser:
    parser = CommandParser("export", __doc__)
    parser.add_argument("model", help="run folder, adapter or model: a folder or a hub name")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--format", choices=list(FORMATS), default="safetensors", help="default safetensors")
    parser.add_argument("--encoder_only", action="store_true", help="leave the masked LM head out")
    parser.add_argument("--pooling", choices=POOLINGS, help="of sentence_transformers (default mean)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default float32)")
    parser.add_argument("--base", help="base model of an adapter, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
