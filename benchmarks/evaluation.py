"""What the figures of an evaluation cost: top-5 accuracy and sums by row, beside loss and top-1 accuracy alone.

The baseline runs the same model on the same batches with the head at masked positions alone, and adds up loss and hits
by `log_softmax` and `argmax`, without a top-5 figure and without standard errors. Both take turns in one process;
medians are compared.

    .venv/bin/python benchmarks/evaluation.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Name: (vocabulary, hidden size, layers, rows of a batch, tokens of a row, batches).
WORKS = {
    "antibody model, 25 tokens": (25, 128, 4, 64, 128, 12),
    "MiniLM size, 30 k": (30_522, 384, 6, 32, 128, 4),
    "MiniLM size, vocabulary 250 k": (250_002, 384, 6, 8, 128, 4),
}


def loss_and_top1(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses, hits and positions, (3,)."""
    from peft_mlm.cross_entropy import _slices

    total = torch.zeros(3, dtype=torch.float64)
    for rows in _slices(logits):
        some, right = logits[rows].float(), targets[rows]
        losses = -some.log_softmax(dim=-1).gather(1, right[:, None])
        total += torch.stack([losses.double().sum(), (some.argmax(-1) == right).sum().double(), torch.tensor(0.0)])
    return total


def ways(work: str) -> dict[str, Callable[[], None]]:
    from peft_mlm.gathered_head import find_door, sum_over_masked
    from peft_mlm.metrics import evaluate_masked_lm

    vocabulary, hidden, layers, rows, length, count = WORKS[work]
    torch.manual_seed(0)
    heads = hidden // 32
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    door, batches = find_door(model), []
    for _ in range(count):
        ids = torch.randint(5, vocabulary, (rows, length))
        labels = torch.where(torch.rand(ids.shape) < 0.15, ids, torch.full_like(ids, -100))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    @torch.no_grad()
    def baseline() -> None:
        for batch in batches:
            inputs: dict[str, Any] = dict(batch)
            sum_over_masked(model, inputs, inputs.pop("labels"), loss_and_top1, door=door)

    def ours() -> None:
        evaluate_masked_lm(model, batches, device=torch.device("cpu"), door=door).describe()

    return {"baseline": baseline, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    results = {}
    for work in WORKS:
        both = ways(work)
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for number in range(rounds + 1):  # the first is for warming up
            for name, run in both.items():
                started = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        results[work] = {**medians, "ratio": medians["ours"] / medians["baseline"]}
        print(f"{work}: {results[work]['ratio']:.2f} of the baseline's time", file=sys.stderr)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
