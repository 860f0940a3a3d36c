"""`peft-mlm plan`: what a run will take of memory, whether it fits, and how long it is, before anything is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_mlm.config import Arguments, describe_help, read_arguments
from peft_mlm.console import bytes_text, print_table
from peft_mlm.errors import ArgumentsError
from peft_mlm.run_folder import RunFolder, is_run_folder, read_json
from peft_mlm.settled_arguments import with_token_lists

GIB = 2**30
# GB on the box, and whether it computes in bfloat16 by itself (NVIDIA's Ampere and newer).
GPUS: Mapping[str, tuple[float, bool]] = {
    "GTX 1080 Ti": (11, False), "RTX 2060": (6, False), "RTX 2070": (8, False), "RTX 2080 Ti": (11, False),
    "T4": (16, False), "V100": (16, False), "RTX 3050": (8, True), "RTX 3060": (12, True), "RTX 3070": (8, True),
    "RTX 3080": (10, True), "RTX 3090": (24, True), "RTX 4060": (8, True), "RTX 4060 Ti": (8, True),
    "RTX 4070": (12, True), "RTX 4080": (16, True), "RTX 4090": (24, True), "RTX 5070": (12, True),
    "RTX 5080": (16, True), "RTX 5090": (32, True), "A10": (24, True), "L4": (24, True), "A100": (40, True),
    "H100": (80, True),
}  # fmt: skip
PARTS = {
    "weights": "weights of the base",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "logits": "logits",
    "margin": "fragmentation, buffers",
}


def plan(
    config: Mapping[str, Any] | str | Path, *, flags: Sequence[str] = (), gpu: str | None = None
) -> dict[str, Any]:
    """Plan a run from its arguments alone: no weights are loaded, and none are fetched.

    Args:
        config: The arguments of a training as a dict, a JSON or YAML file, or a run folder. Text and `output_dir` may
            be missing.
        flags: With a file: words of a command line that override it.
        gpu: Memory of a GPU that need not be there, such as "12GB", or its name; else the run is planned for what is
            here.

    Returns:
        Memory by part, whether it fits, what to change, steps and tokens, as `peft-mlm plan --json` prints it.

    Raises:
        ArgumentsError: Arguments are wrong; all faults are named.
        ModelError: The base or its tokenizer cannot serve.
        AdapterError: The adapter's options do not fit the base.
    """
    memory = None if gpu is None else read_gpu(gpu)
    if isinstance(config, Mapping):
        return _plan(read_arguments(values=config, planned=True), memory, None)
    run = Path(config).expanduser()
    known = is_run_folder(run)
    arguments = read_arguments(RunFolder(run).arguments if known else run, flags, planned=True)
    return _plan(arguments, memory, RunFolder(run) if known else None)


def read_gpu(text: str) -> tuple[str, int, bool]:
    """Read what `--gpu` says.

    Args:
        text: A size such as 12GB, or the name of a GPU. GB are those on a card's box: 2^30 bytes.

    Returns:
        Its name, bytes, and whether it has bfloat16.

    Raises:
        ArgumentsError: It is neither.
    """

    def plain(name: str) -> str:
        return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())

    names = {plain(name): name for name in GPUS} | {plain(name).removeprefix("rtx"): name for name in GPUS}
    if plain(text) in names:
        name = names[plain(text)]
        return name, int(GPUS[name][0] * GIB), GPUS[name][1]
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(g|m)(?:i?b)?)?\s*", text, re.IGNORECASE)
    if size is not None and float(size[1]) > 0:
        count = int(float(size[1]) * (2**20 if (size[2] or "g").lower() == "m" else GIB))
        return f"a GPU with {text.strip()}", count, True
    raise ArgumentsError(
        f"--gpu is {text!r}: give the memory of the GPU, such as 12GB, or one of these names: {', '.join(GPUS)}."
    )


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    rest, gpu, here = _own_flags(words)
    if gpu is not None and here:
        raise ArgumentsError("--gpu and --device are both given: the plan is for one of them. Leave one out.")
    has_config = bool(rest) and not rest[0].startswith("-")
    if has_config:
        return plan(rest[0], flags=rest[1:], gpu=gpu)
    return _plan(read_arguments(None, rest, planned=True), None if gpu is None else read_gpu(gpu), None)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    device = record["device"]
    print_table(f"plan for {record['model']}", None, _facts(record), stream=sys.stdout)
    parts = [[PARTS[name], bytes_text(size)] for name, size in record["parts"].items() if size]
    parts.append(["together, at the largest moment", bytes_text(record["predicted_bytes"])])
    before = "CUDA itself" if device["kind"] == "cuda" else "Python and the libraries"
    parts.append([f"beside that: {before}", bytes_text(device["taken_bytes"])])
    if record["measured_bytes"] is not None:
        parts.append(["measured in the run", bytes_text(record["measured_bytes"])])
    print_table(f"memory ({record['phase']})", None, parts, stream=sys.stdout)
    rows = [
        [
            f"{row['attention']}{' (chosen)' if row['chosen'] else ''}",
            "yes" if row["checkpointing"] else "no",
            bytes_text(row["activations"]),
            bytes_text(row["logits"]),
        ]
        for row in record["activations"]
    ]
    print_table("what a batch holds", ["attention", "checkpointing", "activations", "logits"], rows, stream=sys.stdout)
    rows = [
        [row["rows"], _fit_text(row["predicted_bytes"], row["fits"]),
         _fit_text(row["with_checkpointing"], row["fits_with_checkpointing"])]
        for row in record["batch_sizes"]
    ]  # fmt: skip
    print_table("by rows of a batch", ["rows", "memory", "with checkpointing"], rows, stream=sys.stdout)
    print(f"{_verdict(record)}\n")
    if record["remedies"]:
        rows = [[row["flags"], _fit_text(row["predicted_bytes"], row["fits"])] for row in record["remedies"]]
        title = "what takes less, each with those above (later rows of a batch replace earlier ones)"
        print_table(title, ["add", "memory"], rows, stream=sys.stdout)
    for notice in record["notices"]:
        print(f"note: {notice}")


def help_text() -> str:
    """Give the text of `peft-mlm plan --help`."""
    usage = (
        "usage: peft-mlm plan [CONFIG.yaml|CONFIG.json|RUN_FOLDER] [--argument value ...] [--gpu 12GB | --device]\n"
        "                     [--json]\n\n"
        "Tell what a training will take of memory, whether it fits, what to change where it doesn't, its steps and\n"
        "tokens. Reads the arguments of `peft-mlm train`; no weights are loaded. Exit code 0 also where it doesn't\n"
        "fit: `fits` in --json tells.\n\n"
        "  --gpu SIZE|NAME   plan for a CUDA GPU, which need not be here: its memory (12GB), or a name such as\n"
        "                    'RTX 3060'\n"
        "  --device          plan for what is here: the CUDA GPU, else the machine's own memory (the default)\n"
    )
    return usage + "\n" + describe_help(("model", "data", "peft", "training"))


def _own_flags(words: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """Take out the flags that are no arguments of a training."""
    rest: list[str] = []
    gpu, here, left = None, False, list(words)
    while left:
        word = left.pop(0)
        if word == "--device":
            here = True
        elif word == "--gpu" or word.startswith("--gpu="):
            if "=" not in word and (not left or left[0].startswith("--")):
                raise ArgumentsError("--gpu needs a value: the memory of the GPU, such as 12GB, or its name.")
            gpu = word.partition("=")[2] if "=" in word else left.pop(0)
        else:
            rest.append(word)
    return rest, gpu, here


def _plan(arguments: Arguments, gpu: tuple[str, int, bool] | None, run: RunFolder | None) -> dict[str, Any]:
    from peft_mlm.checkpoint import load_config
    from peft_mlm.memory import CUDA_CONTEXT
    from peft_mlm.planning import Device, make_plan
    from peft_mlm.precision import check_types, settle_types, with_precision

    arguments = with_token_lists(arguments)
    if gpu is None:
        arguments = settle_types(arguments)
        device = _device_here(arguments)
    else:
        name, total, has_bfloat16 = gpu
        device = Device("cuda", name, total, CUDA_CONTEXT)
        check_types(arguments)
        base = arguments.model.model_name_or_path
        if base is not None:
            kind = load_config(base, arguments.model).model_type
            arguments = with_precision(arguments, kind, has_bfloat16=has_bfloat16)
    record = make_plan(arguments, device)
    if run is not None:
        measured = read_json(run.summary).get("memory") or {}
        if measured.get("device") == device.kind:
            record["measured_bytes"] = measured.get("measured_bytes")
    return record


def _device_here(arguments: Arguments) -> Any:
    import torch

    from peft_mlm.memory import CUDA_CONTEXT
    from peft_mlm.memory_watch import available_bytes, resident_bytes
    from peft_mlm.planning import Device
    from peft_mlm.trainer import device_name

    if torch.cuda.is_available() and not arguments.training.get("use_cpu"):
        device = torch.device("cuda", torch.cuda.current_device())
        free, _ = torch.cuda.mem_get_info(device)
        return Device("cuda", device_name(device), free, 0 if torch.cuda.is_initialized() else CUDA_CONTEXT)
    held = resident_bytes() or 0
    free_here = available_bytes()
    return Device("cpu", "this machine's memory", None if free_here is None else free_here + held, held)


def _facts(record: Mapping[str, Any]) -> list[list[str]]:
    trainable, total, batch = record["trainable_parameters"], record["total_parameters"], record["batch"]
    weights = ", ".join(f"{name} {bytes_text(size)}" for name, size in record["weights"].items() if size)
    held = f"{record['holds_in']}, the rest in {record['dtype']}" if record["holds_in"] else record["dtype"]
    about = "about " if record["about"] else ""

    def count(name: str) -> str:
        value = record[name]
        return "not known" if value is None else f"{about}{value:,}"

    steps = record["steps"]
    return [
        ["trained parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"],
        ["weights", f"{weights}; held in {held}, computed in {record['computes_in']}"],
        ["batch", f"{batch['rows']} rows of {batch['tokens']} tokens, {batch['accumulation']} to a step"],
        ["rows of the text", count("rows")],
        ["steps", "not known" if steps is None else f"{about if record['rows'] else ''}{steps:,}"],
        ["tokens seen", count("tokens")],
    ]


def _fit_text(count: int | None, fits: bool | None) -> str:
    if count is None:
        return "-"
    return bytes_text(count) + ("" if fits is None else " fits" if fits else " too much")


def _verdict(record: Mapping[str, Any]) -> str:
    device = record["device"]
    if record["fits"] is None:
        return "Whether it fits is not known: this system does not tell how much memory is free."
    needed = bytes_text(record["predicted_bytes"] + device["taken_bytes"])
    has = f"{device['name']} has {bytes_text(device['total_bytes'])}"
    return f"It fits: {needed} are needed, {has}." if record["fits"] else f"Too much: {needed} are needed, {has}."
