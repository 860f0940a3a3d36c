"""One cell of methods x bases x what else is trained, seen by running it: a tiny BERT, adapted, saved, merged by us.

`run_merge` is what tests and `scripts/build_merging_table.py` are made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peft_mlm
from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.base_recipe import write_base_recipe
from peft_mlm.method_options import method_options
from peft_mlm.methods import METHODS, VARIANTS, Base
from peft_mlm.model import load_base
from tests.matrix_of_methods import NEEDS_OWN_SAVING, SIZES, VARIANT_OPTIONS, options_of, quietly
from tests.tiny import letter_tokenizer, perturb, tiny_model

# Kind of base -> the arguments that load it, and what `methods.py` calls it.
KINDS: dict[str, tuple[dict[str, Any], Base]] = {
    "float32": ({}, "float"),
    "bfloat16": ({}, "float"),
    "nf4": ({"load_in_4bit": True}, "nf4"),
    "int8": ({"load_in_8bit": True}, "int8"),
}
CASES = ("", "head", "tokens")
# How far each trained number is moved. RandLoRA multiplies what it adds by 160 at this rank: moved as far as the
# others, its weights are ten times the base's, and float32 itself rounds them to other logits.
MOVED = {"randlora": 0.005}


@dataclass(frozen=True)
class Merge:
    """What was seen of one merge.

    Attributes:
        difference: Largest difference of a logit between base + adapter and the merged model.
        allowed: What it may be.
        quantised: Largest difference from the adapter on its quantised base; None for a float base.
        file_by_file: Whether the model was merged without being built.
        effect: Largest difference of a logit between the adapter and the base: that there is something to merge.
    """

    difference: float
    allowed: float
    quantised: float | None
    file_by_file: bool
    effect: float


def rows() -> list[tuple[str, str | None]]:
    """List the methods that merge, and the variants that an option alone asks for."""
    methods: list[tuple[str, str | None]] = [(n, None) for n, row in METHODS.items() if not (row.refused or row.merge)]
    variants = [(VARIANTS[name].method, name) for name in VARIANT_OPTIONS if name not in NEEDS_OWN_SAVING]
    return [*methods, *variants]


def save_merge_base(folder: Path, kind: str) -> Path:
    """Save the base of a kind, with its tokenizer."""
    model = tiny_model("bert", **SIZES)
    model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def refusal(method: str, variant: str | None, kind: str, case: str) -> str:
    """Say why a cell is not merged; empty where it is."""
    base = KINDS[kind][1]
    reason = METHODS[method].bases.get(base) or (VARIANTS[variant].bases.get(base) if variant else None)
    if reason:
        return reason
    options = method_options(method)
    if case == "head" and "modules_to_save" not in options:
        return "it trains no modules beside"
    if case == "tokens" and "trainable_token_indices" not in options and METHODS[method].targets != "tokens":
        return "it trains no rows of tokens beside"
    return ""


def run_merge(base: Path, folder: Path, method: str, variant: str | None, kind: str, case: str) -> Merge:
    """Adapt a base, save the adapter, and merge it by the command's function.

    Args:
        base: From `save_merge_base`, of that kind.
        folder: An empty folder to work in.
        method: Name of the method.
        variant: Name of the variant, or None.
        kind: Kind of base.
        case: "" for the method alone, "head" with a trained head, "tokens" with new tokens.

    Returns:
        What was seen.
    """
    torch.manual_seed(0)
    more = {"add_tokens": ["[one]", "[two]"]} if case == "tokens" else {}
    arguments = ModelArguments(model_name_or_path=str(base), **KINDS[kind][0], **more)
    named = ["query", "intermediate.dense"] if method == "adamss" else None  # it takes a second per layer
    options = PEFTArguments(
        peft_method=method,
        peft_config=options_of(method, variant),
        lora_target_modules=named,
        modules_to_save=["cls"] if case == "head" else None,
    )
    with quietly():
        loaded = load_base(arguments)
        plan = plan_adapter(loaded.model, options, new_token_ids=loaded.new_token_ids, total_steps=100)
        adapted = wrap(loaded.model, plan).eval()
        before = logits(adapted)
        perturb(adapted, scale=MOVED.get(method, 0.05))
        effect = float((logits(adapted) - before).abs().max())
        tokenizer = loaded.tokenizer if case == "tokens" else None
        save_adapter(adapted, folder / "adapter", base_name="base", tokenizer=tokenizer)
        write_base_recipe(arguments, folder / "adapter")
        told = peft_mlm.merge(str(folder / "adapter"), folder / "merged", base=str(base), dtype="auto")
    return Merge(
        difference=told["max_abs_logit_diff"],
        allowed=told["tolerance"],
        quantised=told["max_abs_logit_diff_quantised"],
        file_by_file=told["built_because"] is None,
        effect=effect,
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of a row with the last tokens of the vocabulary, which new ones are."""
    last = model.get_base_model().get_input_embeddings().weight.shape[0] - 1
    ids = torch.tensor([[0, 5, 9, 4, 13, 4, last, last - 1, 2]])
    return torch.as_tensor(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).float()
