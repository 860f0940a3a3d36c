"""The kinds of work that are measured, and one process's part in it: `python -m benchmarks.works WORK VARIANT STEPS`.

It gets ready, says so by a line of JSON, and does one turn, with its figures on a line of JSON, for each line it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TARGETS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
VARIANTS = ("baseline", "ours", "ours with the base's dropout")
MAX_SEQ_LENGTH = 128
# ln(tokens) of CoLA's sentences in BERT's vocabulary: 9.3 on average, 18 at the 95th percentile, 45 at most.
SENTENCES = (2.1, 0.47)
# Paragraphs, a third of them longer than a row.
PARAGRAPHS = (4.2, 0.8)


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        what: For people.
        model_type: Type of the model.
        sizes: Changes to its default config, whose sizes are the base models'.
        vocab_size: Rows of its vocabulary.
        batch: Rows per batch.
        sentences: Whether the texts are sentences; else paragraphs.
        rows: What a command makes of them, in rows of 128 tokens at most. The baseline has one row a text, cut at its
            end, or run_mlm's rows for chunked.
        kind: train, rows or evaluate.
        times: How many times the usual number of steps, where steps are short.
    """

    what: str
    model_type: str
    sizes: dict[str, int]
    vocab_size: int
    batch: int
    sentences: bool = False
    rows: str = "chunked"
    kind: str = "train"
    times: int = 1


WORKS = {
    "line": Work("line by line, CoLA-like, MiniLM size, batch 32", "bert", MINILM, 30_522, 32, True, "line", times=6),
    "documents": Work("whole texts, packed, 128 × 16, MiniLM size", "bert", MINILM, 30_522, 16, rows="packed", times=2),
    "packed": Work("packed 128 × 16, MiniLM size", "bert", MINILM, 30_522, 16, times=2),
    "bert": Work("packed 128 × 8, bert-base size", "bert", {}, 30_522, 8),
    "xlmr": Work("packed 128 × 4, XLM-R-base size, vocabulary 250 k", "xlm-roberta", {}, 250_002, 4),
    "rows": Work("tokenise + pack, paragraphs into rows of 128", "bert", MINILM, 30_522, 16, kind="rows"),
    "sentences": Work("tokenise + pack, sentences into rows of 128", "bert", MINILM, 30_522, 16, True, kind="rows"),
    "evaluate": Work("evaluation with accuracy, vocabulary 250 k", "xlm-roberta", {}, 250_002, 8, kind="evaluate"),
}


def make_texts(tokenizer: Any, count: int, lengths: tuple[float, float]) -> Any:
    """Texts of words that are a token each: their numbers log-normal, the words by Zipf's law."""
    import numpy as np
    from datasets import Dataset

    chance = np.random.default_rng(0)
    words = np.array([word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 1], object)
    chance.shuffle(words)
    sizes = np.clip(chance.lognormal(*lengths, size=count).round().astype(int), 2, 45 if lengths == SENTENCES else 400)
    drawn = words[np.minimum(chance.zipf(1.3, size=sizes.sum()), len(words)) - 1]
    return Dataset.from_dict({"text": [" ".join(some) for some in np.split(drawn, sizes.cumsum()[:-1])]})


def baseline_rows(texts: Any, tokenizer: Any, *, line_by_line: bool) -> Any:
    """Rows as run_mlm.py makes them."""

    def encode(batch: dict[str, list[str]]) -> Any:
        limits = {"truncation": True, "max_length": MAX_SEQ_LENGTH} if line_by_line else {}
        return tokenizer(batch["text"], return_special_tokens_mask=True, **limits)

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in batch.items()}
        total = len(joined["input_ids"]) // MAX_SEQ_LENGTH * MAX_SEQ_LENGTH
        starts = range(0, total, MAX_SEQ_LENGTH)
        return {name: [ids[i : i + MAX_SEQ_LENGTH] for i in starts] for name, ids in joined.items()}

    encoded = texts.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return encoded if line_by_line else encoded.map(group, batched=True, load_from_cache_file=False)


def our_rows(texts: Any, tokenizer: Any, *, kind: str) -> Any:
    """Rows as a command makes them."""
    from peft_mlm.packing import make_rows
    from peft_mlm.tokenization import special_token_frame, text_separator, tokenize

    prefix, suffix = special_token_frame(tokenizer)
    frame = {"prefix": prefix, "suffix": suffix, "separator_id": text_separator(tokenizer)}
    tokens = tokenize(texts, tokenizer, overwrite_cache=True)
    return make_rows(tokens, rows=kind, max_seq_length=MAX_SEQ_LENGTH, **frame)[0]  # type: ignore[arg-type]


def settings(work: Work, steps: int, folder: Path) -> dict[str, Any]:
    """Training arguments that all ways of working share."""
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
    """A model of the work's type and size, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(work.model_type, vocab_size=work.vocab_size, **work.sizes)
    return AutoModelForMaskedLM.from_config(config)


def baseline_trainer(model: Any, tokenizer: Any, rows: Any, values: dict[str, Any], *, targets: str = TARGETS) -> Any:
    """Trainer, collator, adapter and evaluation as tutorials write them."""
    import numpy as np
    import transformers
    from peft import LoraConfig, get_peft_model

    def keep_best(logits: Any, labels: Any) -> Any:
        return logits.argmax(dim=-1)

    def accuracy(predictions: Any) -> dict[str, float]:
        best, labels = predictions
        return {"accuracy": float(np.mean(best[labels != -100] == labels[labels != -100]))}

    return transformers.Trainer(
        model=get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets)),
        args=transformers.TrainingArguments(**values),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=keep_best,
    )


def our_trainer(
    model: Any, tokenizer: Any, rows: Any, values: dict[str, Any], *, dropout: bool, by_length: bool
) -> Any:
    """Trainer, collators, adapter and evaluation as `peft-mlm train` builds them."""
    from peft_mlm import collator
    from peft_mlm.adapter import plan_adapter, wrap
    from peft_mlm.arguments import PEFTArguments
    from peft_mlm.dropout import turn_off_dropout
    from peft_mlm.run_folder import RunFolder
    from peft_mlm.saving import saver
    from peft_mlm.trainer import MaskedLMTrainer
    from peft_mlm.training_arguments import build_training_arguments

    folder = Path(values["output_dir"])
    if by_length:
        values = {**values, "train_sampling_strategy": "group_by_length"}  # what a command sets for such rows
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


def memory(field: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS), or its peak (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak() -> int:
    """Give free memory back, let the peak start anew, and tell what is held."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def useful_flops(work: Work, tokens: float, length: float) -> float:
    """Operations that training `tokens` tokens in rows of `length` asks for.

    Each weight of a frozen linear layer: 2 forwards, 2 for the gradient of its input. Attention: 4 T H a layer and
    token forwards, twice that backwards. The head runs on the 15 % masked tokens.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(work.model_type, **work.sizes)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    matrices = 3 if work.model_type == "modernbert" else 2  # of the feed-forward part, which is gated there
    weights = layers * (4 * hidden**2 + matrices * hidden * config.intermediate_size)
    head = 0.15 * (hidden**2 + hidden * work.vocab_size)
    return tokens * (4 * (weights + head) + 12 * layers * length * hidden)


class Training:
    """Turns of training steps.

    Args:
        trainer: Built, not yet run.
        steps: Steps of a turn, behind one that is not counted.
        special_ids: Tokens that are not useful.
    """

    def __init__(self, trainer: Any, work: Work, steps: int, special_ids: list[int]) -> None:
        import torch
        from transformers import TrainerCallback

        self.trainer, self.work, self.steps = trainer, work, steps
        self.special_ids = torch.tensor(special_ids)
        self.counts: list[tuple[int, float]] = []
        self.ends: list[float] = []
        step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
            labels = inputs["labels"]
            ids = torch.where(labels == -100, inputs["input_ids"], labels)
            useful = ~torch.isin(ids, self.special_ids.to(ids.device)) & (inputs["attention_mask"] == 1)
            self.counts.append((int(useful.sum()), float(inputs["attention_mask"].sum()) / len(labels)))
            return step(model, inputs, *more, **options)

        trainer.training_step = counted
        ends = self.ends

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if trainer.args.device.type == "cuda":
                    torch.cuda.synchronize()  # a GPU runs behind
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        self.turns = 0

    def turn(self) -> dict[str, float]:
        self.turns += 1
        self.counts.clear()
        self.ends.clear()
        self.trainer.args.max_steps = self.steps + 1
        self.trainer.args.seed = self.trainer.args.data_seed = self.turns  # other rows each turn
        self.trainer.train()
        seconds = self.ends[-1] - self.ends[0]
        tokens = sum(count for count, _ in self.counts[1:])
        length = mean([length for _, length in self.counts[1:]])
        return {
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / self.steps,
            "useful_flops": useful_flops(self.work, tokens, length) / seconds,
        }


def mean(values: list[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)


def evaluation_turn(trainer: Any, rows: Any, work: Work, steps: int) -> dict[str, float]:
    """Evaluate some rows, then four times as many; the memory of either above what was held."""
    count = steps * work.batch
    held = forget_peak()
    started = time.perf_counter()
    trainer.evaluate(rows.select(range(count)))
    seconds, first = time.perf_counter() - started, memory("VmHWM") - held
    held = forget_peak()
    trainer.evaluate(rows.select(range(4 * count)))
    tokens = count * (MAX_SEQ_LENGTH - 2)
    return {"tokens_per_second": tokens / seconds, "step_bytes": first, "step_bytes_of_four": memory("VmHWM") - held}


@contextlib.contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """Watch the memory that is no file's, 200 times a second; give its peak above the start, in bytes, at the end.

    Pages of files that are read through the memory count as resident too, but the system takes them back at will.
    """
    peak, over = [0], threading.Event()
    start = memory("RssAnon")

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], memory("RssAnon") - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def rows_turn(
    tokenizer: Any, make_rows: Callable[..., Any], lengths: tuple[float, float], folder: Path
) -> dict[str, float]:
    """Tokenise and pack 40,000 texts, next to the raw tokenizer on the same; then four times as many."""
    from datasets import load_from_disk

    for count in (40_000, 160_000):
        if not (folder / str(count)).exists():
            make_texts(tokenizer, count, lengths).save_to_disk(folder / str(count))
    texts, more = (load_from_disk(folder / str(count)) for count in (40_000, 160_000))
    plain = [text for batch in texts.iter(1000) for text in batch["text"]]
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(plain), 1000):
        encoded = tokenizer._tokenizer.encode_batch_fast(plain[start : start + 1000], add_special_tokens=False)
        tokens += sum(len(one) for one in encoded)
    raw = time.perf_counter() - started
    del plain, encoded
    forget_peak()
    with anonymous_peak() as of_one:
        started = time.perf_counter()
        make_rows(texts, tokenizer)
        seconds = time.perf_counter() - started
    forget_peak()
    with anonymous_peak() as of_four:
        make_rows(more, tokenizer)
    return {
        "tokens_per_second": tokens / seconds,
        "step_bytes": of_one[0],
        "times_the_raw_tokenizer": seconds / raw,
        "step_bytes_of_four": of_four[0],
    }


def turns(name: str, variant: str, steps: int, folder: Path) -> Iterator[dict[str, float]]:
    """Get ready, then give the figures of a turn each time one is asked for."""
    ours, work = variant != VARIANTS[0], WORKS[name]
    if ours:
        from peft_mlm.processor import tune_processor

        tune_processor()  # as every command does, before torch is imported
    import datasets
    import transformers
    from transformers import AutoTokenizer

    from tests.checkpoints import minilm

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    if ours:
        make_rows: Callable[..., Any] = partial(our_rows, kind=work.rows)
    else:
        make_rows = partial(baseline_rows, line_by_line=work.rows != "chunked")
    if work.kind == "rows":
        yield {}
        while True:
            yield rows_turn(tokenizer, make_rows, SENTENCES if work.sentences else PARAGRAPHS, folder)
    texts = make_texts(tokenizer, 4000, SENTENCES if work.sentences else PARAGRAPHS)
    rows = make_rows(texts, tokenizer)
    model, values = make_model(work), settings(work, steps, folder)
    if ours:
        keep = variant == VARIANTS[2]
        trainer = our_trainer(model, tokenizer, rows, values, dropout=keep, by_length=work.rows == "line")
    else:
        trainer = baseline_trainer(model, tokenizer, rows, values)
    if work.kind == "evaluate":
        yield {}
        while True:
            yield evaluation_turn(trainer, rows, work, steps)
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]
    training = Training(trainer, work, steps * work.times, special)
    held = forget_peak()
    yield {}
    while True:
        figures = training.turn()
        yield {**figures, "step_bytes": memory("VmHWM") - held}


def main() -> None:
    name, variant, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    with tempfile.TemporaryDirectory() as folder:
        figures = turns(name, variant, steps, Path(folder))
        print(json.dumps(next(figures)), file=out, flush=True)
        for _ in sys.stdin:
            print(json.dumps(next(figures)), file=out, flush=True)


if __name__ == "__main__":
    main()
