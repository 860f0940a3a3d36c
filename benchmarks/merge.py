"""Merging file by file, against PEFT's merge_and_unload and against `cp`: seconds and peak memory.

    .venv/bin/python benchmarks/merge.py [--layers 30] [--hidden 2048] [--dtype float16] [--shard_mb 500]
                                         [--rounds 3] [--folder DIR]

A BERT with random weights is written in shards, with a LoRA adapter of rank 16 on all linear layers of its encoder. The
ways take turns (cp, ours, cp, ...; PEFT in the first round), each in a process of its own; seconds count from after its
imports. Every way ends with its files on the disk (fsync). Before each, the base is dropped from the page cache where
the system does so (cold), or read once (warm). Peak memory is VmHWM, reset after the imports; the share of the imports
is told. It needs three times the model on disk, and is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WAYS = {"cp": "`cp -r`", "ours": "file by file", "peft": "merge_and_unload, save_pretrained"}
CACHES = ("cold", "warm")


def make_base(folder: Path, given: argparse.Namespace) -> int:
    """Write a model of random weights, shard by shard; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForMaskedLM

    from tests.tiny import letter_tokenizer

    sizes = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden, "num_hidden_layers": given.layers}
    config = AutoConfig.for_model("bert", num_attention_heads=given.hidden // 64, **sizes)
    config.dtype, config.architectures = getattr(torch, given.dtype), ["BertForMaskedLM"]
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    held = 0
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        count = parameter.numel() * config.dtype.itemsize
        if held and held + count > given.shard_mb * 2**20:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += count
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {n: torch.randn(parameters[n].shape, generator=generator).mul_(0.02).to(config.dtype) for n in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    make_adapter(folder.with_name("adapter"), model)
    return total


def make_adapter(folder: Path, model: Any) -> None:
    """Write an adapter of rank 16 on every linear layer of the encoder."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    targets = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets), low_cpu_mem_usage=True)
    shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(t.shape, generator=generator).mul_(0.02) for name, t in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapted.peft_config["default"].save_pretrained(str(folder))


def prepare_cache(base: Path, cache: str) -> None:
    """Drop the base's files from the page cache, or read them into it."""
    for file in base.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if cache == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 2**24):
                pass
        os.close(descriptor)


def status(field: str) -> float:
    """Read a field of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def run_ours(place: Path, dtype: str) -> Callable[[], object]:
    """Merge file by file, as the command does it without its proof."""
    import peft_mlm
    from peft_mlm import merging, proof_text, streaming_merge  # noqa: F401 - what the command imports

    del dtype
    return lambda: peft_mlm.merge(
        str(place / "adapter"), place / "output", base=str(place / "base"), dtype="auto", proof=False
    )


def run_peft(place: Path, dtype: str) -> Callable[[], object]:
    """Merge as PEFT's documentation has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    def run() -> None:
        model = AutoModelForMaskedLM.from_pretrained(place / "base", dtype=getattr(torch, dtype))
        merged = PeftModel.from_pretrained(model, str(place / "adapter")).merge_and_unload()
        merged.save_pretrained(place / "output", max_shard_size="500MB")
        sync(place / "output")

    return run


def child(way: str, place: Path, dtype: str) -> None:
    """Run one way in this process, and print what it took."""
    work = (run_ours if way == "ours" else run_peft)(place, dtype)
    imports = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": status("VmHWM"), "imports_mb": imports}))


def measure(way: str, place: Path, given: argparse.Namespace) -> dict[str, float]:
    """Run one way, and remove what it wrote."""
    if way == "cp":
        start = time.perf_counter()
        subprocess.run(["cp", "-r", place / "base", place / "output"], check=True)
        copied = time.perf_counter() - start
        sync(place / "output")
        seen = {"seconds": time.perf_counter() - start, "copied": copied, "peak_mb": 0.0, "imports_mb": 0.0}
    else:
        command = [sys.executable, __file__, "--child", way, "--folder", str(place), "--dtype", given.dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        seen = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(place / "output")
    return seen


def rounds(place: Path, given: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Let the ways take turns; PEFT, which takes ten times as long, in the first round alone."""
    for number in range(given.rounds):
        for cache in CACHES:
            for way in WAYS if number == 0 else ("cp", "ours"):
                prepare_cache(place / "base", cache)
                seen = measure(way, place, given)
                print(f"{cache} {way} {seen}", file=sys.stderr, flush=True)
                yield cache, way, seen


def summarise(seen: list[tuple[str, str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Give the medians by cache and way, with the time as a multiple of cp's of the same round."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for cache in CACHES:
        runs = {way: [s for c, w, s in seen if (c, w) == (cache, way)] for way in WAYS}
        table[cache] = {}
        for way, records in runs.items():
            row = {key: statistics.median(r[key] for r in records) for key in records[0]}
            pairs = zip(records, runs["cp"], strict=False)
            row["times_cp"] = statistics.median(r["seconds"] / cp["seconds"] for r, cp in pairs)
            table[cache][way] = row
    return table


def markdown(record: dict[str, Any]) -> str:
    """Write the table."""
    shard = record["largest_shard_mb"]
    lines = ["| base in the page cache | way | seconds | times cp | peak memory, MiB | beyond the imports |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for cache, ways in record["medians"].items():
        for way, row in ways.items():
            memory = "| |" if way == "cp" else f"| {row['peak_mb']:.0f} | "
            if way != "cp":
                beyond = row["peak_mb"] - row["imports_mb"]
                memory += f"{beyond:.0f} ({beyond / shard:.2f} shards) |"
            lines.append(
                f"| {'no' if cache == 'cold' else 'yes'} | {WAYS[way]} | {row['seconds']:.1f} | "
                f"{row['times_cp']:.2f} {memory}"
            )
    return "\n".join(lines)


def processor() -> str:
    """Name the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    """Make the model, run all ways, print the table and write benchmarks/results/merge.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default in (("--layers", int, 30), ("--hidden", int, 2048), ("--shard_mb", int, 500)):
        parser.add_argument(flag, type=kind, default=default)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if it is left out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder, given.dtype)
        return
    from peft_mlm.run_folder import describe_environment, write_json

    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        place = Path(temporary)
        (place / "base").mkdir()
        total = make_base(place / "base", given)
        shards = [file.stat().st_size / 2**20 for file in (place / "base").glob("*.safetensors")]
        seen = list(rounds(place, given))
    record = {
        "layers": given.layers,
        "hidden": given.hidden,
        "dtype": given.dtype,
        "base_mb": total / 2**20,
        "shards": len(shards),
        "largest_shard_mb": max(shards),
        "rounds": given.rounds,
        "medians": summarise(seen),
        "environment": describe_environment("cpu"),
        "processor": processor(),
    }
    write_json(ROOT / "benchmarks" / "results" / "merge.json", record)
    print(f"{total / 1e9:.1f} GB in {len(shards)} shards, {given.dtype}, {given.layers} layers of {given.hidden}\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
