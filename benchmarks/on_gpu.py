"""Training on a GPU, ours against what people run today: tokens per second, share of the matmul peak, GPU memory.

    .venv/bin/python benchmarks/on_gpu.py [--shapes bert,xlm-roberta,modernbert] [--lengths 128,512] [--steps 20]

Shapes of published base models with random weights, LoRA (r 8) on all linear layers of the encoder, bf16; plain and in
4 bits (nf4). The baseline is Trainer, DataCollatorForLanguageModeling and get_peft_model with bf16=True. Rows are full:
nothing is gained by padding less. Each measurement has a process of its own; baseline and ours take turns.

`--device cpu --small` goes the same way on a CPU with tiny models: it shows that the script runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.works import Training, Work, baseline_trainer, our_trainer  # noqa: E402

# model type: (vocabulary, linear layers of the encoder, for the baseline)
LAYERS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
SHAPES = {
    "bert": (30_522, LAYERS),
    "xlm-roberta": (250_002, LAYERS),
    "modernbert": (50_368, r".*layers\.\d+\.(attn\.(Wqkv|Wo)|mlp\.(Wi|Wo))"),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
# XLM-R numbers positions from the padding's on, and has rows for 512 tokens beside these, as published.
PUBLISHED = {"xlm-roberta": {"max_position_embeddings": 514}}
TOKENS = 16_384
VARIANTS = ("baseline", "ours")


def make_base(work: Work, folder: Path) -> None:
    """Write a model with random weights, and the tokenizer of the tests' checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    from tests.checkpoints import minilm

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102}
    config = AutoConfig.for_model(work.model_type, vocab_size=work.vocab_size, **special, **work.sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)


def build(work: Work, variant: str, length: int, values: dict[str, Any], folder: Path, *, nf4: bool) -> Any:
    """Load the base as this way of working does, and make its trainer."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BitsAndBytesConfig

    options: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(1000, 30_000, size=(64 * work.batch, length)).astype(np.int32)
    rows = Dataset.from_dict({"input_ids": list(ids)})
    if variant == "baseline":
        if nf4:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, **options)
        return baseline_trainer(model, tokenizer, rows, values, targets=SHAPES[work.model_type][1])
    from peft_mlm.arguments import ModelArguments
    from peft_mlm.model import load_base

    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"} if nf4 else {}
    arguments = ModelArguments(model_name_or_path=str(folder), dtype="bfloat16", **options)
    return our_trainer(load_base(arguments).model, tokenizer, rows, values, dropout=False, by_length=False)


def measure(
    shape: str, variant: str, length: int, steps: int, *, nf4: bool, small: bool, device: str
) -> dict[str, Any]:
    """One way of working, in this process."""
    import torch

    tokens = 256 if small else TOKENS
    vocabulary = SHAPES[shape][0]
    sizes = PUBLISHED.get(shape, {}) | (SMALL if small else {})
    work = Work("", shape, sizes, vocabulary, max(1, tokens // length))
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as folder:
        make_base(work, Path(base))
        values = {
            "output_dir": folder,
            "per_device_train_batch_size": work.batch,
            "learning_rate": 3e-4,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": True,
            "use_cpu": device == "cpu",
            "disable_tqdm": True,
        }
        trainer = build(work, variant, length, values, Path(base), nf4=nf4)
        training = Training(trainer, work, steps, [0, 101, 102, 103])
        training.turn()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        figures = training.turn()
        figures["peak_bytes"] = float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0
    return figures


def matmul_peak(device: str) -> float:
    """Operations per second of a product of two large bfloat16 matrices."""
    import time

    import torch

    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        a @ a
    wait()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    wait()
    return 40 * size**3 / (time.perf_counter() - started)


def compare(given: argparse.Namespace, shape: str, length: int, *, nf4: bool) -> dict[str, Any]:
    """Let both ways take turns, and give the medians."""
    seen: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(given.rounds):
        for variant, runs in seen.items():
            words = [sys.executable, str(Path(__file__)), "--measure", shape, variant, str(length), str(int(nf4))]
            words += ["--steps", str(given.steps), "--device", given.device] + ["--small"] * given.small
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for variant, runs in seen.items()
    }
    baseline, ours = medians["baseline"], medians["ours"]
    return {
        "name": f"{shape}, {length} tokens, {'nf4' if nf4 else 'bf16'}",
        "ratio": ours["tokens_per_second"] / baseline["tokens_per_second"],
        "memory_ratio": ours["peak_bytes"] / max(1.0, baseline["peak_bytes"]),
        "variants": medians,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--lengths", default="128,512")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", nargs=4)
    given = parser.parse_args()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("This needs a CUDA GPU, and torch finds none. --device cpu --small tries the script.", file=sys.stderr)
        return 2
    if given.measure:
        shape, variant, length, nf4 = given.measure
        out, sys.stdout = sys.stdout, sys.stderr
        options = {"nf4": bool(int(nf4)), "small": given.small, "device": given.device}
        print(json.dumps(measure(shape, variant, int(length), given.steps, **options)), file=out)
        return 0
    from peft_mlm.run_folder import describe_environment

    kinds = [(s, int(n), q) for s in given.shapes.split(",") for n in given.lengths.split(",") for q in (False, True)]
    rows = [compare(given, shape, length, nf4=nf4) for shape, length, nf4 in kinds]
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    peak = matmul_peak(given.device)
    record = {"environment": describe_environment(name), "matmul_peak": peak, "rows": rows}
    if not given.small:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "on_gpu.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}; best matrix product {peak / 1e12:,.1f} TFLOP/s (bf16)\n")
    print(
        "| work | ÷ baseline | tokens/s: baseline | ours | of the matmul peak: baseline | ours "
        "| peak MB: baseline | ours |\n| --- |" + " --- |" * 7
    )
    for row in rows:
        both = [row["variants"][variant] for variant in VARIANTS]
        cells = [row["name"], f"{row['ratio']:.2f}×"]
        cells += [f"{one['tokens_per_second']:,.0f}" for one in both]
        cells += [f"{one['useful_flops'] / peak:.0%}" for one in both]
        cells += [f"{one['peak_bytes'] / 1e6:,.0f}" for one in both]
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
