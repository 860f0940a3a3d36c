"""Training and preprocessing, ours against what people run today, in turn (A B A B) in one process.

The baseline is written on the libraries' own parts: run_mlm's preprocessing, DataCollatorForLanguageModeling, Trainer
and get_peft_model. Text, model, adapter, batch size and steps are the same. The model is the MiniLM encoder from the
test environment; the text is made here, with the word frequencies of real text.

    .venv/bin/python benchmarks/against_run_mlm.py [--steps 20] [--pairs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer

from peft_mlm import collator
from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.model import load_base
from peft_mlm.packing import make_rows
from peft_mlm.run_folder import RunFolder, describe_environment
from peft_mlm.tokenization import special_token_frame, text_separator, tokenize
from peft_mlm.trainer import MaskedLMTrainer, build_training_arguments, saver
from tests.checkpoints import minilm

BATCH = 32


def make_texts(tokenizer: Any, count: int) -> Dataset:
    """Texts of 5 to 40 words, drawn by Zipf's law from the vocabulary's whole words."""
    chance = np.random.default_rng(0)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 1]
    chance.shuffle(words)
    ranks = np.minimum(chance.zipf(1.3, size=(count, 40)), len(words)) - 1
    lengths = chance.integers(5, 40, size=count)
    texts = [" ".join(words[r] for r in row[:n]) for row, n in zip(ranks, lengths, strict=True)]
    return Dataset.from_dict({"text": texts})


def baseline_rows(texts: Dataset, tokenizer: Any, length: int) -> Dataset:
    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in batch.items()}
        total = len(joined["input_ids"]) // length * length
        return {name: [ids[i : i + length] for i in range(0, total, length)] for name, ids in joined.items()}

    encoded = texts.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return encoded.map(group, batched=True, load_from_cache_file=False)


def our_rows(texts: Dataset, tokenizer: Any, length: int) -> Dataset:
    prefix, suffix = special_token_frame(tokenizer)
    frame = {"prefix": prefix, "suffix": suffix, "separator_id": text_separator(tokenizer)}
    return make_rows(tokenize(texts, tokenizer, overwrite_cache=True), max_seq_length=length, **frame)[0]


def settings(steps: int, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": steps,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def baseline_trainer(name: str, tokenizer: Any, rows: Dataset, steps: int, folder: Path) -> Trainer:
    model = AutoModelForMaskedLM.from_pretrained(name)
    targets = (
        r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["transform"])
    arguments = transformers.TrainingArguments(**settings(steps, folder))
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer)
    return Trainer(model=get_peft_model(model, config), args=arguments, train_dataset=rows, data_collator=collate)


def our_trainer(name: str, tokenizer: Any, rows: Dataset, steps: int, folder: Path) -> Trainer:
    base = load_base(ModelArguments(model_name_or_path=name))
    plan = plan_adapter(base.model, PEFTArguments(use_lora=True), fresh_parameters=base.fresh_parameters)
    return MaskedLMTrainer(
        model=wrap(base.model, plan),
        args=build_training_arguments(settings(steps, folder), folder),
        train_dataset=rows,
        data_collator=collator.from_tokenizer(tokenizer),
        eval_collator=collator.from_tokenizer(tokenizer, fixed=True),
        processing_class=tokenizer,
        save=saver(base_name="minilm", tokenizer=tokenizer, tokenizer_changed=False),
        run=RunFolder(folder),
    )


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(pairs: int, baseline: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, float]:
    taken = [(seconds(baseline), seconds(ours)) for _ in range(pairs)]
    return {
        "baseline_seconds": statistics.median(a for a, _ in taken),
        "our_seconds": statistics.median(b for _, b in taken),
        "ratio": statistics.median(a / b for a, b in taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    name = str(minilm())
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = make_texts(tokenizer, 20_000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        timed = in_turn(
            given.pairs, lambda: baseline_rows(texts, tokenizer, 128), lambda: our_rows(texts, tokenizer, 128)
        )
        rows.append({"name": "tokenise + make rows of 128", **timed})
        same = our_rows(texts, tokenizer, 128)
        timed = in_turn(
            given.pairs,
            lambda: baseline_trainer(name, tokenizer, same, given.steps, place / "a").train(),
            lambda: our_trainer(name, tokenizer, same, given.steps, place / "b").train(),
        )
        tokens = given.steps * BATCH * 128
        rows.append(
            {"name": f"train, rows of 128, batch {BATCH}", **timed, "our_tokens": tokens / timed["our_seconds"]}
        )
    result = {"environment": describe_environment("cpu"), "rows": rows}
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "against_run_mlm.json").write_text(json.dumps(result, indent=2) + "\n")
    print("| work | baseline, s | ours, s | ratio |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['name']} | {row['baseline_seconds']:.2f} | {row['our_seconds']:.2f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
