"""`peft-mlm fill-mask`: the most probable tokens for each mask in a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
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


def fill_mask_side_by_side(
    base: str,
    texts: str | Sequence[str],
    adapters: Mapping[str, str] | Sequence[str],
    *,
    top_k: int = 5,
    any_base: bool = False,
) -> dict[str | None, list[dict[str, Any]]]:
    """Predict the masked tokens of texts with a base, and with each of several adapters on it.

    Args:
        base: The base model (a folder or a hub name); it is loaded once.
        texts: As in `fill_mask`.
        adapters: Runs or adapters by name, or a list of them, which are named after their folders.
        top_k: How many tokens to give per mask.
        any_base: Also adapters that were trained on a base with other weights.

    Returns:
        By name of the adapter, and under None for the base, what `fill_mask` gives.

    Raises:
        ArgumentsError: `top_k` is no positive number.
    """
    from peft_mlm.adapter_set import load_adapters

    if top_k < 1:
        raise ArgumentsError(f"top_k is {top_k}; it must be 1 or more.")
    given = [texts] if isinstance(texts, str) else list(texts)
    together = load_adapters(adapters, base=base, any_base=any_base)
    return {name: [predict(together.loaded(name), text, top_k) for text in given] for name in (None, *together.names)}


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
    if given.adapter:
        return _side_by_side(given, texts)
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
    if "adapters" in record:
        return _show_side_by_side(record)
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


def _side_by_side(given: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """The base's own predictions as without adapters, and those of each adapter beside them."""
    alone = ("base", "use_base", "load_in_4bit", "load_in_8bit")
    if clash := [f"--{name}" for name in alone if getattr(given, name)]:
        raise ArgumentsError(
            f"{', '.join(clash)} does not go with --adapter: {given.model} is the base, and is asked too."
        )
    parts = [word.partition("=") if "=" in word else ("", "", word) for word in given.adapter]
    named = {name: path for name, _, path in parts if name}
    if named and len(named) < len(parts):
        raise ArgumentsError("--adapter: give each adapter a name of its own (NAME=PATH), or none a name.")
    found = fill_mask_side_by_side(
        given.model, texts, named or [path for _, _, path in parts], top_k=given.top_k, any_base=given.any_base
    )
    base = found.pop(None)
    return {"model": given.model, "results": base, "adapters": found}


def _show_side_by_side(record: dict[str, Any]) -> None:
    columns = {"base": record["results"], **record["adapters"]}
    for index, result in enumerate(record["results"]):
        rows = []
        for number, mask in enumerate(result["masks"]):
            for place in range(len(mask["predictions"])):
                guesses = [results[index]["masks"][number]["predictions"][place] for results in columns.values()]
                cells = [f"{guess['token']} {guess['probability']:.4f}" for guess in guesses]
                rows.append([f"mask {number + 1}" if place == 0 else "", *cells])
        print_table(result["text"], ["", *columns], rows, stream=sys.stdout)


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
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=PATH",
        help="a run or an adapter to show beside MODEL, which then is their base; may be given several times",
    )
    parser.add_argument("--load_in_4bit", action="store_true", help="load the model, or the base, in 4 bits (nf4)")
    parser.add_argument("--load_in_8bit", action="store_true", help="the same in 8 bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
