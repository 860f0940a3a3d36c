"""Forty adapters on one base: memory, time to switch, to replace, and to run a batch in which every row has its own.

    python benchmarks/forty_adapters.py

A base of roberta-base's size (random weights: neither memory nor time depends on them) and LoRA adapters of rank 8 on
all linear layers of its encoder. Every adapter is checked against itself alone before anything is timed. Prints a
Markdown table, and writes benchmarks/results/forty_adapters.json with versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.adapter_set import AdapterSet, load_adapters
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.console import quiet_libraries
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.loading import load
from peft_mlm.model import load_base
from peft_mlm.run_folder import describe_environment, write_json

RESULTS = Path(__file__).parent / "results" / "forty_adapters.json"
TOKENIZER = Path(__file__).parent.parent / "peft_mlm" / "demo_assets" / "sapiens_vh"
ROWS, TOKENS = 8, 32


def save_base(folder: Path, *, small: bool) -> None:
    """Save a base of roberta-base's size with the demo's tokenizer, whose 25 tokens are a part of the vocabulary."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(
        vocab_size=1000 if small else 50265, max_position_embeddings=514, type_vocab_size=1, **(sizes if small else {})
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def save_adapters(base: Path, folder: Path, count: int) -> None:
    """Save adapters that differ in every weight."""
    loaded = load_base(ModelArguments(model_name_or_path=str(base)))
    model = wrap(loaded.model, plan_adapter(loaded.model, PEFTArguments(use_lora=True, lora_r=8)))
    first = folder / "adapter_00"
    save_adapter(model, first, base_name=str(base))
    write_fingerprint(loaded.fingerprint, first)
    weights = load_file(first / "adapter_model.safetensors")
    for number in range(count):
        copy = folder / f"adapter_{number:02d}"
        copy.mkdir(exist_ok=True)
        for file in ("adapter_config.json", "base_fingerprint.json"):
            (copy / file).write_bytes((first / file).read_bytes())
        generator = torch.Generator().manual_seed(number)
        other = {n: torch.randn(w.shape, generator=generator) * 0.02 for n, w in weights.items()}
        save_file(other, copy / "adapter_model.safetensors", metadata={"format": "pt"})


def resident() -> int:
    """Memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def seconds(run: Callable[[], Any], times: int) -> list[float]:
    """Time a call several times."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return taken


def switch_by_peft(together: AdapterSet, name: str) -> None:
    """Switch as plain PEFT does, module by module."""
    together.model.set_adapter(together._inner[name], inference_mode=True)


def check_exact(together: AdapterSet, paths: dict[str, str], ids: torch.Tensor) -> None:
    """Three of the adapters against themselves alone, bit by bit."""
    for name in (together.names[0], together.names[len(together.names) // 2], together.names[-1]):
        alone = load(paths[name]).model
        with torch.no_grad():
            one, other = (
                m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (alone, together.use(name))
            )
        if not torch.equal(one, other):
            raise SystemExit(f"{name} is not what it is alone")


@torch.no_grad()
def one_after_another(together: AdapterSet, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Each row with its adapter switched on, alone."""
    rows = []
    for row, name in zip(ids.split(1), names, strict=True):
        rows.append(together.use(name)(input_ids=row, attention_mask=torch.ones_like(row)).logits)
    return torch.cat(rows)


def with_other_rank(path: str, folder: Path) -> str:
    """Save the first half of an adapter's ranks."""
    half = folder / "half"
    if not half.exists():
        half.mkdir()
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        (half / "adapter_config.json").write_text(json.dumps({**config, "r": config["r"] // 2}))
        (half / "base_fingerprint.json").write_bytes((Path(path) / "base_fingerprint.json").read_bytes())
        weights = load_file(Path(path) / "adapter_model.safetensors")
        cut = {n: (w[: len(w) // 2] if "lora_A" in n else w[:, : w.shape[1] // 2]) for n, w in weights.items()}
        cut = {n: w.contiguous() for n, w in cut.items()}
        save_file(cut, half / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(half)


def measure(count: int, folder: Path, *, small: bool) -> dict[str, Any]:
    """Build base and adapters, load them together, check, and time."""
    # In a process of its own, so that this one's memory is that of what it loads.
    make = [sys.executable, __file__, "--make", str(folder), "--adapters", str(count), *(["--small"] if small else [])]
    subprocess.run(make, check=True)
    paths = {path.name: str(path) for path in sorted(folder.glob("adapter_*"))}
    before = resident()
    started = time.perf_counter()
    together = load_adapters(paths)
    load_seconds = time.perf_counter() - started
    total_resident = resident() - before
    sizes = {name: p.numel() * p.element_size() for name, p in together.model.named_parameters()}
    adapter_bytes = sum(size for name, size in sizes.items() if "lora_" in name) // count
    base_bytes = sum(sizes.values()) - count * adapter_bytes
    ids = torch.randint(5, 25, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    check_exact(together, paths, ids)
    names = together.names
    switches = [time_of for name in names for time_of in seconds(lambda name=name: together.use(name), 1)]
    walks = [time_of for name in names for time_of in seconds(lambda name=name: switch_by_peft(together, name), 1)]
    together.use(names[-1])
    batch_names = [names[i * len(names) // ROWS] for i in range(ROWS)]
    mixed, apart = (
        together.logits(ids, torch.ones_like(ids), batch_names),
        one_after_another(together, ids, batch_names),
    )
    difference = float((mixed - apart).abs().max())
    together.use(names[0])
    in_one = seconds(lambda: together.logits(ids, torch.ones_like(ids), batch_names), 5)
    in_turn = seconds(lambda: one_after_another(together, ids, batch_names), 5)
    with torch.no_grad():
        same = seconds(lambda: together.use(names[0])(input_ids=ids, attention_mask=torch.ones_like(ids)), 5)
    replaced = seconds(lambda: together.replace(names[1], paths[names[2]]), 5)
    others = [with_other_rank(paths[names[2]], folder), paths[names[2]]]
    wider = [seconds(lambda path=path: together.replace(names[1], path), 1)[0] for path in others * 2]
    return {
        "adapters": count,
        "base_parameters": base_bytes // 4,
        "base_mb": base_bytes / 1e6,
        "adapter_mb": adapter_bytes / 1e6,
        "all_mb": (base_bytes + count * adapter_bytes) / 1e6,
        "all_resident_mb": total_resident / 1e6,
        "forty_models_mb": count * base_bytes / 1e6,
        "load_seconds": load_seconds,
        "switch_ms": statistics.median(switches) * 1e3,
        "switch_by_peft_ms": statistics.median(walks) * 1e3,
        "replace_ms": statistics.median(replaced) * 1e3,
        "replace_other_rank_ms": statistics.median(wider) * 1e3,
        "mixed_batch_ms": statistics.median(in_one) * 1e3,
        "one_after_another_ms": statistics.median(in_turn) * 1e3,
        "one_adapter_for_all_rows_ms": statistics.median(same) * 1e3,
        "mixed_difference": difference,
        "rows": ROWS,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
    }


def table(r: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        ("base", f"{r['base_parameters'] / 1e6:.0f} M parameters, {r['base_mb']:.0f} MB"),
        ("one adapter (LoRA, rank 8, all linear layers)", f"{r['adapter_mb']:.2f} MB"),
        (
            f"base and {r['adapters']} adapters",
            f"{r['all_mb']:.0f} MB (the process grows by {r['all_resident_mb']:.0f} MB)",
        ),
        (f"{r['adapters']} merged models would take", f"{r['forty_models_mb']:.0f} MB"),
        ("loading all of it", f"{r['load_seconds']:.1f} s"),
        ("switching to another adapter", f"{r['switch_ms']:.2f} ms"),
        ("the same by PEFT's set_adapter", f"{r['switch_by_peft_ms']:.1f} ms"),
        ("replacing one by another of its kind", f"{r['replace_ms']:.0f} ms"),
        ("replacing one by one of another rank", f"{r['replace_other_rank_ms']:.0f} ms"),
        (f"a batch of {r['rows']} rows, {r['rows']} adapters, in one pass", f"{r['mixed_batch_ms']:.0f} ms"),
        ("the same rows one after another", f"{r['one_after_another_ms']:.0f} ms"),
        ("the same rows with one adapter", f"{r['one_adapter_for_all_rows_ms']:.0f} ms"),
        ("largest difference of a logit, mixed against alone", f"{r['mixed_difference']:.1e}"),
    ]
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="a tiny base, to try the script")
    parser.add_argument("--make", type=Path, help="only make base and adapters, in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    quiet_libraries()
    if given.make is not None:
        save_base(given.make / "base", small=given.small)
        save_adapters(given.make / "base", given.make, given.adapters)
        return
    with tempfile.TemporaryDirectory() as folder:
        record = measure(given.adapters, Path(folder), small=given.small)
    print(table(record))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.results, {**record, "environment": describe_environment("cpu")})


if __name__ == "__main__":
    main()
