"""Pseudo-log-likelihoods: ours against a plain loop, in one run.

The plain loop is what one writes first: for each text a batch of its masked copies, and the head on every position.
Same model, same texts, same threads; the two take turns.

    .venv/bin/python benchmarks/scoring.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peft_mlm.pseudo_likelihood import pseudo_log_likelihoods  # noqa: E402
from peft_mlm.text_files import read_rows  # noqa: E402
from tests.checkpoints import minilm  # noqa: E402

ASSETS = ROOT / "peft_mlm" / "demo_assets"
# MiniLM's size with BERT's vocabulary.
SMALL_BERT = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}


def plain_loop(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    scores = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        places = torch.arange(1, len(ids) - 1)
        rows = ids.repeat(len(places), 1)
        rows[torch.arange(len(places)), places] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        found = logits[torch.arange(len(places)), places].log_softmax(-1)
        scores.append(float(found.gather(1, ids[1:-1, None]).double().sum()))
    return scores


def works() -> dict[str, tuple[Any, Any, list[str]]]:
    sapiens = (
        AutoModelForMaskedLM.from_pretrained(ASSETS / "sapiens_vh").eval(),
        AutoTokenizer.from_pretrained(ASSETS / "sapiens_vh"),
        read_rows([str(ASSETS / "germline" / "human_validation.fasta")], None).texts[:6],
    )
    tokenizer, draw = AutoTokenizer.from_pretrained(minilm()), random.Random(0)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii())
    sentences = [" ".join(draw.choices(words, k=draw.randint(4, 24))) for _ in range(40)]
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SMALL_BERT)).eval()
    return {
        "Sapiens VH, 6 sequences": sapiens,
        "MiniLM size, vocabulary 30 k, 40 sentences": (bert, tokenizer, sentences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| work | plain loop, s | ours, s | ÷ | largest difference, nats |")
    print("| --- | --- | --- | --- | --- |")
    for name, (model, tokenizer, texts) in works().items():
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(given.rounds):
            begun = time.perf_counter()
            plain = plain_loop(model, tokenizer, texts)
            seconds["plain"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            ours = [score.log_likelihood for score in pseudo_log_likelihoods(model, tokenizer, texts)]
            seconds["ours"].append(time.perf_counter() - begun)
        middle = {way: statistics.median(values) for way, values in seconds.items()}
        apart = max(abs(a - b) for a, b in zip(plain, ours, strict=True))
        ratio = middle["plain"] / middle["ours"]
        print(f"| {name} | {middle['plain']:.2f} | {middle['ours']:.2f} | {ratio:.2f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
