"""Training, preprocessing and evaluation, ours against what people run today.

The baseline is written on the libraries' own parts: run_mlm's preprocessing, DataCollatorForLanguageModeling, Trainer
and get_peft_model. Text, model, adapter, batch, precision and steps are the same. Each figure comes from a process of
its own, so that its peak memory is its own; baseline and ours take turns (A B C A B C), and medians are compared.

    .venv/bin/python benchmarks/against_run_mlm.py [--works line,packed,...] [--steps 12] [--rounds 3]

Models have the sizes of published ones and random weights; the text is made here, with the word frequencies of real
text. Useful tokens are those of the texts: special tokens and padding count in none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TARGETS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
VARIANTS = ("baseline", "ours", "ours with the base's dropout")


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        what: For people.
        model_type: Type of the model.
        sizes: Changes to its default config, whose sizes are the base models'.
        vocab_size: Rows of its vocabulary.
        batch: Rows per batch.
        line_by_line: One row per text of 4 to 20 words, else rows of 128 tokens.
        kind: train, rows or evaluate.
    """

    what: str
    model_type: str
    sizes: dict[str, int]
    vocab_size: int
    batch: int
    line_by_line: bool = False
    kind: str = "train"


WORKS = {
    "line": Work("line by line, MiniLM size, batch 32", "bert", MINILM, 30_522, 32, line_by_line=True),
    "packed": Work("packed 128 x 16, MiniLM size", "bert", MINILM, 30_522, 16),
    "bert": Work("packed 128 x 8, bert-base size", "bert", {}, 30_522, 8),
    "xlmr": Work("packed 128 x 4, XLM-R-base size, vocabulary 250 k", "xlm-roberta", {}, 250_002, 4),
    "rows": Work("tokenise + pack, rows of 128", "bert", MINILM, 30_522, 16, kind="rows"),
    "evaluate": Work("evaluation with accuracy, vocabulary 250 k", "xlm-roberta", {}, 250_002, 8, kind="evaluate"),
}


def make_texts(tokenizer: Any, count: int, longest: int) -> Any:
    """Texts of 4 words to `longest`, drawn by Zipf's law from the vocabulary's whole words."""
    import numpy as np
    from datasets import Dataset

    chance = np.random.default_rng(0)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 1]
    chance.shuffle(words)
    ranks = np.minimum(chance.zipf(1.3, size=(count, longest)), len(words)) - 1
    lengths = chance.integers(4, longest, size=count)
    return Dataset.from_dict(
        {"text": [" ".join(words[r] for r in row[:n]) for row, n in zip(ranks, lengths, strict=True)]}
    )


def baseline_rows(texts: Any, tokenizer: Any, length: int, *, line_by_line: bool) -> Any:
    def encode(batch: dict[str, list[str]]) -> Any:
        limits = {"truncation": True, "max_length": length} if line_by_line else {}
        return tokenizer(batch["text"], return_special_tokens_mask=True, **limits)

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in batch.items()}
        total = len(joined["input_ids"]) // length * length
        return {name: [ids[i : i + length] for i in range(0, total, length)] for name, ids in joined.items()}

    encoded = texts.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return encoded if line_by_line else encoded.map(group, batched=True, load_from_cache_file=False)


def our_rows(texts: Any, tokenizer: Any, length: int, *, line_by_line: bool) -> Any:
    from peft_mlm.packing import make_rows
    from peft_mlm.tokenization import special_token_frame, text_separator, tokenize

    prefix, suffix = special_token_frame(tokenizer)
    frame = {"prefix": prefix, "suffix": suffix, "separator_id": text_separator(tokenizer)}
    tokens = tokenize(texts, tokenizer, overwrite_cache=True)
    return make_rows(tokens, rows="line" if line_by_line else "chunked", max_seq_length=length, **frame)[0]


def settings(work: Work, steps: int, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": work.batch,
        "per_device_eval_batch_size": work.batch,
        "max_steps": steps,
        "learning_rate": 3e-4,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": steps,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def make_model(work: Work) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(work.model_type, vocab_size=work.vocab_size, **work.sizes)
    return AutoModelForMaskedLM.from_config(config)


def baseline_trainer(work: Work, tokenizer: Any, rows: Any, steps: int, folder: Path) -> Any:
    import numpy as np
    import transformers
    from peft import LoraConfig, get_peft_model

    def keep_best(logits: Any, labels: Any) -> Any:
        return logits.argmax(dim=-1)

    def accuracy(predictions: Any) -> dict[str, float]:
        best, labels = predictions
        return {"accuracy": float(np.mean(best[labels != -100] == labels[labels != -100]))}

    return transformers.Trainer(
        model=get_peft_model(make_model(work), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)),
        args=transformers.TrainingArguments(**settings(work, steps, folder)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=keep_best,
    )


def our_trainer(work: Work, tokenizer: Any, rows: Any, steps: int, folder: Path, *, dropout: bool) -> Any:
    from peft_mlm import collator
    from peft_mlm.adapter import plan_adapter, wrap
    from peft_mlm.arguments import PEFTArguments
    from peft_mlm.dropout import turn_off_dropout
    from peft_mlm.run_folder import RunFolder
    from peft_mlm.trainer import MaskedLMTrainer, build_training_arguments, saver

    values = settings(work, steps, folder)
    if work.line_by_line:
        values["train_sampling_strategy"] = "group_by_length"  # what a command sets for such rows
    model = make_model(work)
    if not dropout:
        turn_off_dropout(model)
    return MaskedLMTrainer(
        model=wrap(model, plan_adapter(model, PEFTArguments(use_lora=True))),
        args=build_training_arguments(values, folder),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator.from_tokenizer(tokenizer),
        eval_collator=collator.from_tokenizer(tokenizer, fixed=True),
        processing_class=tokenizer,
        save=saver(base_name="base", tokenizer=tokenizer, tokenizer_changed=False),
        run=RunFolder(folder),
    )


def peak_bytes(*, reset: bool = False) -> int:
    """Peak resident memory of this process, in bytes; Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(work: Work, variant: str, steps: int) -> dict[str, float]:
    """Do one kind of work in one way, in this process."""
    import datasets
    import transformers
    from transformers import AutoTokenizer

    from tests.checkpoints import minilm

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    ours = variant != "baseline"
    make_rows: Callable[..., Any] = our_rows if ours else baseline_rows
    if work.kind == "rows":
        return _measure_rows(tokenizer, make_rows)
    longest, count = (20, 3000) if work.line_by_line else (40, 2000)
    rows = make_rows(make_texts(tokenizer, count, longest), tokenizer, 128, line_by_line=work.line_by_line)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    useful = sum(token not in special for row in rows["input_ids"] for token in row) / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            keep = variant.endswith("dropout")
            trainer = our_trainer(work, tokenizer, rows, steps, Path(folder), dropout=keep)
        else:
            trainer = baseline_trainer(work, tokenizer, rows, steps, Path(folder))
        if work.kind == "evaluate":
            some = rows.select(range(steps * work.batch))
            trainer.evaluate(some.select(range(work.batch)))
            before = peak_bytes(reset=True)
            started = time.perf_counter()
            trainer.evaluate(some)
        else:
            trainer.args.max_steps = 2
            trainer.train()
            trainer.args.max_steps = steps
            before = peak_bytes(reset=True)
            started = time.perf_counter()
            trainer.train()
        seconds = time.perf_counter() - started
    return {"tokens_per_second": useful * work.batch * steps / seconds, "step_bytes": peak_bytes() - before}


def _measure_rows(tokenizer: Any, make_rows: Callable[..., Any]) -> dict[str, float]:
    texts = make_texts(tokenizer, 100_000, 40)
    plain = [text for batch in texts.iter(1000) for text in batch["text"]]
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(plain), 1000):
        encoded = tokenizer._tokenizer.encode_batch(plain[start : start + 1000], add_special_tokens=False)
        tokens += sum(len(one.ids) for one in encoded)
    raw = time.perf_counter() - started
    before = peak_bytes(reset=True)
    started = time.perf_counter()
    make_rows(texts, tokenizer, 128, line_by_line=False)
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": tokens / seconds,
        "step_bytes": peak_bytes() - before,
        "times_the_raw_tokenizer": seconds / raw,
    }


def in_own_process(name: str, variant: str, steps: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", name, "--variant", variant, "--steps", str(steps)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Let the variants take turns, and give the medians with their ratios to the baseline."""
    work = WORKS[name]
    variants = VARIANTS if work.kind == "train" else VARIANTS[:2]
    seen: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            seen[variant].append(in_own_process(name, variant, steps))
    medians = {
        variant: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for variant, all_ in seen.items()
    }
    first = medians["baseline"]
    for figures in medians.values():
        figures["speed_ratio"] = figures["tokens_per_second"] / first["tokens_per_second"]
        figures["memory_ratio"] = figures["step_bytes"] / max(1, first["step_bytes"])
    return {"work": work.what, "variants": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WORKS)
    parser.add_argument("--variant", choices=VARIANTS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(WORKS[given.measure], given.variant, given.steps)))
        return
    from peft_mlm.run_folder import describe_environment

    results = [compare(name, given.steps, given.rounds) for name in given.works.split(",")]
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    record = {"environment": describe_environment("cpu"), "works": results}
    (folder / "against_run_mlm.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        "| work | | tokens/s | ÷ baseline | memory above the start, MB | ÷ baseline |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for result in results:
        for variant, figures in result["variants"].items():
            raw = figures.get("times_the_raw_tokenizer")
            note = "" if raw is None else f" ({raw:.2f} x the raw tokenizer)"
            print(
                f"| {result['work']} | {variant}{note} | {figures['tokens_per_second']:,.0f} | "
                f"{figures['speed_ratio']:.2f} | {figures['step_bytes'] / 1e6:,.0f} | {figures['memory_ratio']:.2f} |"
            )


if __name__ == "__main__":
    main()
