"""Predicted memory against the measured peak of real training runs: `python -m benchmarks.memory [--only NAME]`.

Models of three sizes with random weights are trained for a few steps, each run in a process of its own, and what
`peft-mlm train` records is printed as Markdown. It takes no timings; 6 GB of memory are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# name: (model type, sizes, vocabulary)
MODELS = {
    "MiniLM 6 × 384": ("bert", MINILM, 30_522),
    "BERT-base 12 × 768": ("bert", {}, 30_522),
    "XLM-R-base, 250 k tokens": ("xlm-roberta", {}, 250_002),
    "BERT-large 24 × 1024": ("bert", LARGE, 30_522),
}
WORDS = "the of and to in is was for on as with by at from water house light small number people place time"
LORA, CHECKPOINTING = ["--use_lora"], ["--activation_checkpointing"]
# model, rows, tokens, further flags
RUNS = [
    ("MiniLM 6 × 384", 8, 128, LORA),
    ("MiniLM 6 × 384", 32, 64, LORA),
    ("MiniLM 6 × 384", 8, 256, []),
    ("MiniLM 6 × 384", 16, 128, [*LORA, *CHECKPOINTING]),
    ("BERT-base 12 × 768", 8, 128, LORA),
    ("BERT-base 12 × 768", 4, 128, []),
    ("BERT-base 12 × 768", 4, 256, [*LORA, "--attn_implementation", "eager"]),
    ("BERT-base 12 × 768", 8, 128, [*LORA, *CHECKPOINTING]),
    ("XLM-R-base, 250 k tokens", 4, 128, LORA),
    ("XLM-R-base, 250 k tokens", 4, 128, [*LORA, *CHECKPOINTING]),
    ("BERT-large 24 × 1024", 4, 128, LORA),
]
# A heap that gives large freed blocks back: what is measured then has no holes.
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def save_model(name: str, folder: Path) -> None:
    """Save a model of random weights, with the tokenizer of a real one."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    from tests.checkpoints import minilm

    kind, sizes, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)


def save_text(folder: Path) -> Path:
    """Write texts of common words."""
    words = WORDS.split()
    chance = random.Random(0)
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(chance.choices(words, k=60)) for _ in range(4000)) + "\n", encoding="utf-8")
    return path


def measure(
    model: Path, text: Path, run: Path, rows: int, tokens: int, flags: list[str], exact: bool
) -> dict[str, int]:
    """Train a few steps in a process of its own; what its summary says of memory."""
    words = ["--model_name_or_path", model, "--train_file", text, "--output_dir", run, "--max_seq_length", tokens,
             "--per_device_train_batch_size", rows, "--per_device_eval_batch_size", min(rows, 8), "--max_steps", 4,
             "--max_eval_samples", 8, "--save_strategy", "no", "--use_cpu", *flags]  # fmt: skip
    command = [sys.executable, "-m", "peft_mlm", "train", *map(str, words), "--json"]
    env = {**os.environ, **(EXACT_HEAP if exact else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    memory: dict[str, int] = json.loads(done.stdout)["memory"]
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a part of a model's name")
    only = parser.parse_args().only or ""
    print("| model | batch | | predicted | measured | ÷ | without holes: predicted | measured | ÷ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = save_text(folder)
        for number, (name, rows, tokens, flags) in enumerate(RUNS):
            if only not in name:
                continue
            model = folder / "".join(filter(str.isalnum, name))
            if not model.exists():
                for other in folder.glob("*/model.safetensors"):
                    other.unlink()
                save_model(name, model)
            what = " ".join(flag.removeprefix("--") for flag in flags) or "whole model"
            cells = [name, f"{rows} × {tokens}", what]
            for exact in (False, True):
                memory = measure(model, text, folder / f"run{number}{exact}", rows, tokens, flags, exact)
                said, found = memory["predicted_bytes"], memory["measured_bytes"]
                cells += [f"{said / 1e6:,.0f} MB", f"{found / 1e6:,.0f} MB", f"{said / found:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
