"""`peft-mlm fill-mask`: the most probable tokens for each mask in a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_mlm.console import CommandParser, print_table
from peft_mlm.errors import ArgumentsError, DataError
from peft_mlm.model_checks import check_path

if TYPE_CHECKING:
    from peft_mlm.loading import Loaded

# Spellings of the mask that are replaced by the tokenizer's own.
MASK_SPELLINGS = ("[MASK]", "<mask>")


def fill_mask(
    name_or_path: str,
    texts: str | Sequence[str],
    *,
    top_k: int = 5,
    base: str | None = None,
    any_base: bool = False,
    use_base: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> list[dict[str, Any]]:
    """Predict the masked tokens of texts.

    Every mask is predicted with all masks of its text in place, as in training.

    Args:
        name_or_path: A run folder, an adapter or a model (a folder or a hub name).
        texts: One text or several, each with one mask or several: the tokenizer's mask token, `[MASK]` or `<mask>`.
        top_k: How many tokens to give per mask.
        base: Base model, if it is not the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.
        use_base: Leave the adapter out.
        load_in_4bit: Load a model, or the base, in 4 bits (nf4); an adapter's base is always as it was in training.
        load_in_8bit: The same in 8 bits.

    Returns:
        Per text: `text`, `masks` (per mask `position` in tokens, and `predictions`: `token`, `token_id`,
        `probability`), `filled` (the text with the best token at each mask).

    Raises:
        ArgumentsError: `top_k` is no positive number, or an adapter is asked for on a base in other bits.
        DataError: A text has no mask, or is longer than the model holds.
    """
    if top_k < 1:
        raise ArgumentsError(f"top_k is {top_k}; it must be 1 or more.")
    check_path(name_or_path)

    from peft_mlm.loading import load_target, resolve_target, with_quantisation

    given = [texts] if isinstance(texts, str) else list(texts)
    target = resolve_target(name_or_path, base=base, part="base" if use_base else "adapted")
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    loaded = load_target(with_quantisation(target, bits if any(bits.values()) else {}), any_base=any_base)
    return [predict(loaded, text, top_k) for text in given]


def predict(loaded: Loaded, text: str, top_k: int) -> dict[str, Any]:
    """Predict the masked tokens of one text.

    Args:
        loaded: Model and tokenizer.
        text: With one mask or several.
        top_k: Tokens per mask.

    Returns:
        As in `fill_mask`.

    Raises:
        DataError: There is no mask in the text, or it is too long.
    """
    import torch

    from peft_mlm.positions import position_limit

    tokenizer, model = loaded.tokenizer, loaded.model
    own = tokenizer.mask_token
    for spelling in MASK_SPELLINGS:
        text = text.replace(spelling, own)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    positions = (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not positions:
        raise DataError(f"There is no mask in {text!r}. Write {own} where a token is to be predicted.")
    limit = position_limit(loaded.base.model)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(f"A text has {ids.shape[1]} tokens, the model holds {limit}. Shorten it: {text[:60]!r}...")
    ids = ids.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, positions].float()
    probabilities, best = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    masks = [
        {
            "position": position,
            "predictions": [
                {"token": tokenizer.decode([i]).strip(), "token_id": i, "probability": p}
                for i, p in zip(row_ids, row_probabilities, strict=True)
            ],
        }
        for position, row_ids, row_probabilities in zip(positions, best.tolist(), probabilities.tolist(), strict=True)
    ]
    filled = ids[0].cpu()
    filled[positions] = best[:, 0].cpu()
    return {"text": text, "masks": masks, "filled": tokenizer.decode(filled.tolist(), skip_special_tokens=True)}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    texts = given.text or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError("There is no text: give it after the model's name, or on standard input.")
    results = fill_mask(
        given.model,
        texts,
        top_k=given.top_k,
        base=given.base,
        any_base=given.any_base,
        use_base=given.use_base,
        load_in_4bit=given.load_in_4bit,
        load_in_8bit=given.load_in_8bit,
    )
    return {"model": given.model, "results": results}


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    for result in record["results"]:
        rows = [
            [f"mask {number}" if place == 0 else "", p["token"], f"{p['probability']:.4f}"]
            for number, mask in enumerate(result["masks"], start=1)
            for place, p in enumerate(mask["predictions"])
        ]
        print_table(result["text"], ["", "token", "probability"], rows, stream=sys.stdout)
        print(result["filled"])


def help_text() -> str:
    """Give the text of `peft-mlm fill-mask --help`."""
    return _parser().format_help()


def _parser() -> CommandParser:
    parser = CommandParser("fill-mask", __doc__)
    parser.add_argument("model", help="run folder, adapter or model: a folder or a hub name")
    parser.add_argument(
        "text", nargs="*", default=[], help="texts with masks; standard input, one per line, if none is given"
    )
    parser.add_argument("--top_k", type=int, default=5, help="tokens per mask (default 5)")
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument("--use_base", action="store_true", help="leave the adapter out")
    parser.add_argument("--load_in_4bit", action="store_true", help="load the model, or the base, in 4 bits (nf4)")
    parser.add_argument("--load_in_8bit", action="store_true", help="the same in 8 bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
