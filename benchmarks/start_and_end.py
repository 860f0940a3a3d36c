"""Where the seconds of one small run go: ours against the same done by hand with transformers and PEFT.

The shipped antibody model learns mouse antibodies for 20 steps, with two evaluations and two checkpoints: what is not
training is most of it. Each run is a process of its own; the two take turns, and medians are compared.

    .venv/bin/python benchmarks/start_and_end.py [--rounds 3]
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
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ASSETS = ROOT / "peft_mlm" / "demo_assets"
BASE = ASSETS / "sapiens_vh"
STEPS, EVERY, BATCH, LENGTH = 20, 10, 32, 144
PARTS = ("attention.self.query", "attention.self.key", "attention.self.value")
TARGETS = rf".*encoder\.layer\.\d+\.({'|'.join(PARTS)}|(attention\.output|intermediate|output)\.dense)"
PHASES = (
    "import",
    "read text",
    "load model and tokenizer",
    "tokenise, make rows",
    "wrap",
    "build the trainer",
    "evaluate the base",
    "first step",
    "other steps",
    "evaluations in training",
    "checkpoints",
    "evaluate the result",
    "save",
    "everything else",
)


class Clock:
    """Adds up seconds by phase; a phase within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.within: list[str] = []
        self.since = self.started = time.perf_counter()

    def enter(self, phase: str) -> None:
        self._settle()
        self.within.append(phase)

    def leave(self) -> None:
        self._settle()
        self.within.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self.within[-1] if self.within else "everything else"] += now - self.since
        self.since = now

    def watch(self, owner: Any, name: str, *phases: str) -> None:
        """Count a function's time: its first call for the first phase, ..., all further ones for the last."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[f"{owner.__name__}.{name}"]
            self.calls[f"{owner.__name__}.{name}"] += 1
            self.enter(phases[min(call, len(phases) - 1)])
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, watched)

    def record(self) -> dict[str, float]:
        self._settle()
        return {**self.seconds, "in all": time.perf_counter() - self.started}


def texts_of(fasta: Path, folder: Path) -> Path:
    """Write the sequences of a FASTA file as lines."""
    parts = fasta.read_text().split(">")[1:]
    file = folder / f"{fasta.stem}.txt"
    file.write_text("".join("".join(part.splitlines()[1:]) + "\n" for part in parts))
    return file


def run_ours(train: Path, validation: Path, folder: Path, clock: Clock) -> None:
    clock.enter("import")
    import peft_mlm.commands.train as command
    from peft_mlm import adaptation, corpus, data, model
    from peft_mlm.trainer import MaskedLMTrainer

    clock.leave()
    clock.watch(data, "load_text", "read text")
    clock.watch(model, "load_base", "load model and tokenizer")
    clock.watch(corpus, "build_corpus", "tokenise, make rows")
    clock.watch(adaptation, "adapt", "wrap")
    clock.watch(command, "_build_trainer", "build the trainer")
    clock.watch(MaskedLMTrainer, "measure", "evaluate the base", "evaluations in training")
    clock.watch(MaskedLMTrainer, "measure_trained", "evaluate the result")
    clock.watch(MaskedLMTrainer, "training_step", "first step", "other steps")
    clock.watch(MaskedLMTrainer, "_save_checkpoint", "checkpoints")
    clock.watch(command, "_save", "save")
    command.train(
        {
            "model_name_or_path": str(BASE),
            "train_file": str(train),
            "validation_file": str(validation),
            "cache_dir": str(folder / "cache"),
            "output_dir": str(folder / "run"),
            "rows": "line",
            "max_seq_length": LENGTH,
            "use_lora": True,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "max_steps": STEPS,
            "eval_strategy": "steps",
            "eval_steps": EVERY,
            "save_strategy": "steps",
            "save_steps": EVERY,
            "learning_rate": 1e-3,
            "report_to": "none",
        }
    )


def run_plain(train: Path, validation: Path, folder: Path, clock: Clock) -> None:
    """The same by hand."""
    clock.enter("import")
    import numpy as np
    import transformers
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    clock.leave()
    clock.watch(
        Trainer, "evaluate", "evaluate the base", *["evaluations in training"] * (STEPS // EVERY), "evaluate the result"
    )
    clock.watch(Trainer, "training_step", "first step", "other steps")
    clock.watch(Trainer, "_save_checkpoint", "checkpoints")
    clock.watch(Trainer, "save_model", *["checkpoints"] * (STEPS // EVERY), "save")
    clock.enter("read text")
    files = {"train": str(train), "validation": str(validation)}
    texts = load_dataset("text", data_files=files, cache_dir=str(folder / "cache"))
    clock.leave()
    clock.enter("load model and tokenizer")
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForMaskedLM.from_pretrained(BASE, dtype="float32")
    clock.leave()
    clock.enter("tokenise, make rows")

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=LENGTH, return_special_tokens_mask=True)

    rows = texts.map(encode, batched=True, remove_columns=["text"])
    clock.leave()
    clock.enter("wrap")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    clock.leave()

    def accuracy(predictions: Any) -> dict[str, float]:
        best, labels = predictions
        return {"accuracy": float(np.mean(best[labels != -100] == labels[labels != -100]))}

    clock.enter("build the trainer")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            max_steps=STEPS,
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="steps",
            save_steps=EVERY,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    clock.leave()
    transformers.logging.set_verbosity_error()
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "adapter"))


VARIANTS = {"plain": run_plain, "ours": run_ours}


def in_own_process(variant: str) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", variant]
    with tempfile.TemporaryDirectory() as cache:  # nothing is found that an earlier run has left
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    clock = Clock()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=VARIANTS)
    given = parser.parse_args()
    if given.measure:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            germline = ASSETS / "germline"
            files = [texts_of(germline / f"mouse_{part}.fasta", folder) for part in ("train", "validation")]
            VARIANTS[given.measure](*files, folder, clock)
            print(json.dumps(clock.record()))
        return
    from peft_mlm.run_folder import describe_environment

    seen: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(given.rounds):
        for variant in VARIANTS:
            seen[variant].append(in_own_process(variant))
    medians = {
        variant: {phase: statistics.median(one.get(phase, 0.0) for one in all_) for phase in (*PHASES, "in all")}
        for variant, all_ in seen.items()
    }
    rows = [{"name": phase, **{variant: medians[variant][phase] for variant in VARIANTS}} for phase in medians["ours"]]
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    record = {"environment": describe_environment("cpu"), "rounds": given.rounds, "rows": rows}
    (folder / "start_and_end.json").write_text(json.dumps(record, indent=2) + "\n")
    print("| seconds | transformers + PEFT by hand | ours |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['name']} | {row['plain']:.2f} | {row['ours']:.2f} |")


if __name__ == "__main__":
    main()
