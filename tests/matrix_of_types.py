"""One model type through the whole life of an adapter, each step held against plain transformers and PEFT.

base on disk -> load -> wrap -> train -> save -> reload on the untouched base -> merge -> save -> reload. The record
holds differences, not verdicts: the tests judge them, and `scripts/build_support_table.py` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch.nn import functional
from transformers import AutoModelForMaskedLM

from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.collator import from_tokenizer
from peft_mlm.gathered_head import find_door
from peft_mlm.loading import load_target, resolve_target
from peft_mlm.merging import merge_adapter
from peft_mlm.metrics import masked_lm_loss
from peft_mlm.model import load_base
from tests.tiny import letter_texts, letter_tokenizer, save_base

STEPS, LEARNING_RATE = 3, 1e-2
# Whose mask overflows in float64, so that gradients are NaN where a whole window is padding.
ONLY_FLOAT32 = ("longformer",)
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TypeRecord:
    """Largest differences seen for a model type; logits, unless said otherwise.

    Attributes:
        model_type: The type.
        parameters: Of the tiny base.
        targets: Layers adapted.
        learned: How far training moved the logits: a check that there is something to compare.
        trained_in: Type of the weights in gradient and train: float64, or float32 where that cannot be.
        gradient: Of our loss over two unequal micro-batches, against plain cross-entropy over the whole batch, as a
            share of the largest gradient.
        train: Of the trained weights, against a plain PEFT model trained by a plain loop.
        reload: Saved adapter on the untouched base, by our loader and by plain PEFT, against the trained model
            (float32).
        reload_float64: The same in float64.
        merge: Merged model, saved and loaded by plain transformers, against the trained model (float32).
        merge_float64: The same in float64, where only what was written counts.
    """

    model_type: str
    parameters: int
    targets: int
    learned: float
    trained_in: str
    gradient: float
    train: float
    reload: float
    reload_float64: float
    merge: float
    merge_float64: float


def run_type(model_type: str, folder: Path) -> TypeRecord:
    """Take a tiny model of a type through train, save, reload, merge, save, reload.

    Args:
        model_type: A type that can be adapted.
        folder: An empty folder to work in.

    Returns:
        The differences that were seen.
    """
    base_folder = save_base(folder / "base", model_type)
    base = load_base(ModelArguments(model_name_or_path=str(base_folder)))
    plan = plan_adapter(base.model, PEFTArguments(use_lora=True, lora_r=4))
    batches = make_batches()
    untouched = logits_of(base.model, batches)
    plain = plain_adapter(base_folder, list(plan.target_modules))
    model = wrap(base.model, plan)
    copy_adapter(model, plain)

    precise = torch.float32 if model_type in ONLY_FLOAT32 else torch.float64
    ours, theirs = model.to(precise), plain.to(precise)
    gradient = gradient_difference(ours, theirs, batches)
    train_ours(ours, batches)
    train_plainly(theirs, batches)
    train = largest_difference(adapter_weights(ours), adapter_weights(theirs))

    trained = model.float()
    save_adapter(trained, folder / "adapter", base_name="base")
    expected, expected_64 = logits_of(trained, batches), logits_of(trained.double(), batches)
    loaded = load_target(resolve_target(str(folder / "adapter"), base=str(base_folder)))
    set_peft_model_state_dict(theirs.float(), load_peft_weights(str(folder / "adapter"), device="cpu"))
    reload = [largest_difference(logits_of(m, batches), expected) for m in (loaded.model, theirs)]
    reload_64 = [largest_difference(logits_of(m.double(), batches), expected_64) for m in (loaded.model, theirs)]
    loaded.model.float()
    merge_adapter(loaded.model, loaded.tokenizer, folder / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(folder / "merged").eval()
    return TypeRecord(
        model_type=model_type,
        parameters=sum(p.numel() for p in merged.parameters()),
        targets=len(plan.target_modules),
        learned=largest_difference(untouched, expected),
        trained_in=str(precise).removeprefix("torch."),
        gradient=gradient,
        train=train,
        reload=max(reload),
        reload_float64=max(reload_64),
        merge=largest_difference(logits_of(merged, batches), expected),
        merge_float64=largest_difference(logits_of(merged.double(), batches), expected_64),
    )


def make_batches(count: int = 2) -> list[Batch]:
    """Batches of four masked rows of unequal lengths, padded to the same length."""
    tokenizer = letter_tokenizer()
    collator = from_tokenizer(tokenizer, mlm_probability=0.3, fixed=True, pad_to=24)
    texts = letter_texts(4 * count, shortest=8, longest=20)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    return [collator(rows[4 * i : 4 * i + 4]) for i in range(count)]


def plain_adapter(base_folder: Path, targets: list[str]) -> PeftModel:
    """A LoRA adapter as one writes it by hand, on the base as transformers loads it."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    return get_peft_model(AutoModelForMaskedLM.from_pretrained(base_folder), config)


def adapter_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The trained weights, in the order of the model."""
    return [p.detach() for p in model.parameters() if p.requires_grad]


def copy_adapter(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Start both at the same random matrices."""
    with torch.no_grad():
        for mine, theirs in zip(adapter_weights(source), adapter_weights(target), strict=True):
            theirs.copy_(mine)


def gradient_difference(ours: torch.nn.Module, theirs: torch.nn.Module, batches: list[Batch]) -> float:
    """Compare gradients at the first step, off the adapter's start, where half of them are zero."""
    gradients = []
    for model in (ours.eval(), theirs.eval()):
        generator = torch.Generator().manual_seed(3)
        starts = adapter_weights(model)
        before = [start.clone() for start in starts]
        with torch.no_grad():
            for start in starts:
                start.add_(torch.randn(start.shape, generator=generator, dtype=start.dtype) * 0.05)
        model.zero_grad()
        if model is ours:
            accumulate_ours(model, batches)
        else:
            plain_loss(model, whole_batch(batches)).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
        model.zero_grad()
        with torch.no_grad():
            for start, was in zip(starts, before, strict=True):
                start.copy_(was)
    largest = max(float(g.abs().max()) for g in gradients[1])
    return largest_difference(*gradients) / largest


def accumulate_ours(model: torch.nn.Module, batches: list[Batch]) -> None:
    """Our loss over micro-batches of three and five rows, one after the other."""
    batch = whole_batch(batches)
    masked, door = (batch["labels"] != -100).sum(), find_door(model)  # type: ignore[arg-type]
    for rows in (slice(0, 3), slice(3, None)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        labels = part.pop("labels")
        masked_lm_loss(model, part, labels, masked, door=door).backward()  # type: ignore[no-untyped-call]


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the masked tokens, as a textbook has it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def train_ours(model: torch.nn.Module, batches: list[Batch]) -> None:
    """A few steps with our loss, dropout on.

    Picked before the head: within the last layer, dropout would be drawn for the picked rows alone, and thus otherwise.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    door = find_door(model)  # type: ignore[arg-type]
    door = None if door is None else door._replace(last_layer=None)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        inputs = dict(batches[step % len(batches)])
        labels = inputs.pop("labels")
        masked_lm_loss(model, inputs, labels, door=door).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def train_plainly(model: torch.nn.Module, batches: list[Batch]) -> None:
    """The same steps with the textbook loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        plain_loss(model, batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def whole_batch(batches: list[Batch]) -> Batch:
    """All rows in one batch."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@torch.no_grad()
def logits_of(model: Any, batches: list[Batch]) -> list[torch.Tensor]:
    """Logits at the tokens of each row (not at its padding)."""
    return [
        model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[b["attention_mask"].bool()]
        for b in batches
    ]


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Largest difference of two lists of tensors; NaN if there is one anywhere."""
    return float(torch.stack([(a - b).abs().max().double() for a, b in zip(some, others, strict=True)]).max())
