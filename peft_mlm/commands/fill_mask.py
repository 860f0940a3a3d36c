"""`peft-mlm fill-mask`: the most probable tokens for each mask in a text.

Several masks in a text are predicted independently of one another, each with all of them in place.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peft_mlm.console import CommandParser, cell, print_table, probability_text
from peft_mlm.errors import ArgumentsError, DataError
from peft_mlm.model_checks import check_path
from peft_mlm.token_lists import read_token_list

logger = logging.getLogger(__name__)
# Flags that are for one model alone.
WAYS_OF_ONE = ("use_base", "load_in_4bit", "load_in_8bit")


def fill_mask(
    name_or_path: str,
    texts: str | Sequence[str],
    *,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    max_tokens_per_batch: int | None = None,
    base: str | None = None,
    any_base: bool = False,
    use_base: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> list[dict[str, Any]]:
    """Predict the masked tokens of texts.

    Every mask is predicted with all masks of its text in place, as in training, and independently of the others.

    Args:
        name_or_path: A run folder, an adapter or a model (a folder or a hub name).
        texts: One text or several, each with one mask or several: the tokenizer's mask token, `[MASK]` or `<mask>`.
        top_k: How many tokens to give per mask.
        targets: Words whose probabilities and ranks are wanted at each mask, or a file with one a line. Each must be
            one token there: `pain` after a space is the token that stands for it after a space, within a word the one
            that goes on with it. A token as the vocabulary writes it (`Ġpain`, `##ing`) is that one.
        only: Words, as for `targets`, among which alone the prediction is made.
        max_tokens_per_batch: Texts of a batch, which all have as many tokens, times these, at most. Default 4096 on a
            CPU, 32768 elsewhere. It changes speed and memory, and nothing else.
        base: Base model, if it is not the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.
        use_base: Leave the adapter out.
        load_in_4bit: Load a model, or the base, in 4 bits (nf4); an adapter's base is always as it was in training.
        load_in_8bit: The same in 8 bits.

    Returns:
        Per text: `text`, `masks` (per mask `position` in tokens, and `predictions`: `token`, `token_id`,
        `probability`), `filled` (the text with the best token at each mask). Probabilities are those among all tokens;
        with `only`, predictions have `probability_among` (divided by that of all of `only`) and `rank` (among all
        tokens, from 1) too. With `targets`, masks have `targets`: `target`, `token`, `token_id`, `probability`,
        `rank`, and with `only` `probability_among` and `rank_among`.

    Raises:
        ArgumentsError: A number is not positive, a list of words cannot be read, or an adapter is asked for on a base
            in other bits.
        DataError: A text has no mask, is longer than the model holds, or a word is not one token at a mask.
    """
    question, given = _asked(texts, top_k, targets, only, max_tokens_per_batch)
    check_path(name_or_path)

    from peft_mlm.loading import load_target, resolve_target, with_quantisation
    from peft_mlm.predicting import Predictor, Question

    target = resolve_target(name_or_path, base=base, part="base" if use_base else "adapted")
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    loaded = load_target(with_quantisation(target, bits if any(bits.values()) else {}), any_base=any_base)
    predictor = Predictor(loaded, max_tokens_per_batch=max_tokens_per_batch)
    asked = Question(**question)
    return predictor.predict(loaded.model, predictor.read(given, asked), asked)


def fill_mask_side_by_side(
    texts: str | Sequence[str],
    adapters: Mapping[str, str] | Sequence[str],
    *,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    max_tokens_per_batch: int | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> dict[str | None, list[dict[str, Any]]]:
    """Predict the masked tokens of texts with a base, and with each of several adapters on it.

    Args:
        texts: As in `fill_mask`.
        adapters: Runs or adapters by name, or a list of them, which are named after their folders. A run that trained
            the whole model goes alone.
        top_k: As in `fill_mask`, like the next three.
        targets: Words.
        only: Words.
        max_tokens_per_batch: Tokens.
        base: The base model (a folder or a hub name), if it is not the recorded one; it is loaded once.
        any_base: Also adapters that were trained on a base with other weights.

    Returns:
        By name of the adapter, and under None for the base, what `fill_mask` gives. There is no None where the base
        has no masked LM head of its own.

    Raises:
        ArgumentsError: As in `fill_mask`.
        DataError: As in `fill_mask`.
    """
    question, given = _asked(texts, top_k, targets, only, max_tokens_per_batch)

    from peft_mlm.predicting import Predictor, Question
    from peft_mlm.side_by_side import load_sides

    sides = load_sides(adapters, base=base, any_base=any_base)
    for notice in sides.notices:
        logger.info(notice)
    predictor = Predictor(sides.loaded(next(iter(sides.sides))), max_tokens_per_batch=max_tokens_per_batch)
    asked = Question(**question)
    read = predictor.read(given, asked)
    return {name: predictor.predict(sides.loaded(name).model, read, asked) for name in sides.sides}


def _asked(
    texts: str | Sequence[str],
    top_k: int,
    targets: Sequence[str] | None,
    only: Sequence[str] | None,
    max_tokens_per_batch: int | None,
) -> tuple[dict[str, Any], list[str]]:
    """Check what can be checked before anything is loaded; give the fields of a `Question`, and the texts."""
    for name, value in (("top_k", top_k), ("max_tokens_per_batch", max_tokens_per_batch)):
        if value is not None and value < 1:
            raise ArgumentsError(f"{name} is {value}; it must be 1 or more.")
    words = {"targets": read_token_list("targets", targets), "only": read_token_list("only", only)}
    return {"top_k": top_k, **words}, [texts] if isinstance(texts, str) else list(texts)


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    for option in ("targets", "only"):
        listed = getattr(given, option)
        setattr(given, option, None if listed is None else [word for one in listed for word in one.split(",")])
    texts = _texts(given)
    options = {name: getattr(given, name) for name in ("top_k", "targets", "only", "max_tokens_per_batch", "any_base")}
    if given.adapter:
        return _beside_adapters(given, texts, options)
    if given.with_base:
        return _with_base(given, texts, options)
    alone = {name: getattr(given, name) for name in ("base", *WAYS_OF_ONE)}
    return {"model": given.model, "results": fill_mask(given.model, texts, **options, **alone)}


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    if "adapters" in record or "base" in record:
        return _show_side_by_side(record)
    for result in record["results"]:
        fields = _fields(result["masks"][0])
        rows = []
        for number, mask in enumerate(result["masks"], start=1):
            for place, found in enumerate(mask["predictions"]):
                label = f"mask {number}" if place == 0 else ""
                rows.append([label, found["token"], *_figures({"rank": place + 1, **found}, fields)])
            rows += [["target", one["target"], *_figures(one, fields)] for one in mask.get("targets", ())]
        header = [{"probability_among": "of these"}.get(name, name) for name in fields]
        print_table(result["text"], ["", "token", *header], rows, stream=sys.stdout)
        print(result["filled"])


def help_text() -> str:
    """Give the text of `peft-mlm fill-mask --help`."""
    return _parser().format_help()


def _texts(given: argparse.Namespace) -> list[str]:
    """Take the texts of the command line, of files, or of standard input; blank ones are left out."""
    if given.text and given.file:
        raise ArgumentsError("Give texts after the model's name, or --file, not both.")
    if given.text_column and not given.file:
        raise ArgumentsError("--text_column names a column of --file: give a file.")
    if given.text:
        return list(given.text)
    if not given.file:
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise DataError("There is no text: give it after the model's name, by --file, or on standard input.")
        return texts
    from peft_mlm.text_files import read_rows

    texts = [text for text in read_rows(given.file, given.text_column).texts if text.strip()]
    if not texts:
        raise DataError(f"There is no text in {', '.join(given.file)}: only blank ones.")
    return texts


def _beside_adapters(given: argparse.Namespace, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The base's own predictions as without adapters, and those of each adapter."""
    if clash := [f"--{name}" for name in ("base", "with_base", *WAYS_OF_ONE) if getattr(given, name)]:
        raise ArgumentsError(
            f"{', '.join(clash)} does not go with --adapter: {given.model} is the base, and is asked too."
        )
    parts = [word.partition("=") if "=" in word else ("", "", word) for word in given.adapter]
    named = {name: path for name, _, path in parts if name}
    if named and len(named) < len(parts):
        raise ArgumentsError("--adapter: give each adapter a name of its own (NAME=PATH), or none a name.")
    adapters = named or [path for _, _, path in parts]
    found = fill_mask_side_by_side(texts, adapters, base=given.model, **options)
    base = found.pop(None, None)
    return {"model": given.model, "results": base, "adapters": found}


def _with_base(given: argparse.Namespace, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """What a run or an adapter predicts, and its own base beside it."""
    if clash := [f"--{name}" for name in WAYS_OF_ONE if getattr(given, name)]:
        raise ArgumentsError(f"{', '.join(clash)} does not go with --with_base: both are loaded as they were trained.")
    check_path(given.model)

    from peft_mlm.loading import resolve_target

    target = resolve_target(given.model, base=given.base)
    if target.kind == "model" and target.run is None:
        raise ArgumentsError(f"{given.model} is a model without adapter: the base itself. Leave --with_base out.")
    found = fill_mask_side_by_side(texts, [given.model], base=given.base, **options)
    base = found.pop(None, None)
    return {"model": given.model, "results": next(iter(found.values())), "base": base}


def _show_side_by_side(record: dict[str, Any]) -> None:
    if "adapters" in record:
        given = {"base": record["results"], **record["adapters"]}
    else:
        given = {"base": record["base"], "adapted": record["results"]}
    columns = {name: results for name, results in given.items() if results is not None}
    for index, result in enumerate(next(iter(columns.values()))):
        rows = []
        for number, mask in enumerate(result["masks"]):
            each = [results[index]["masks"][number] for results in columns.values()]
            for place in range(len(mask["predictions"])):
                guesses = [one["predictions"][place] for one in each]
                cells = [f"{guess['token']} {probability_text(guess['probability'])}" for guess in guesses]
                rows.append([f"mask {number + 1}" if place == 0 else "", *cells])
            for place, target in enumerate(mask.get("targets", ())):
                found = [one["targets"][place] for one in each]
                cells = [f"{probability_text(one['probability'])} (rank {one['rank']:,})" for one in found]
                rows.append([f"  {target['target']}", *cells])
        print_table(result["text"], ["", *columns], rows, stream=sys.stdout)


def _fields(mask: dict[str, Any]) -> list[str]:
    """Which figures a table shows: a rank where it says more than the order of the rows."""
    restricted = "probability_among" in mask["predictions"][0]
    return [
        "probability",
        *(["probability_among"] if restricted else []),
        *(["rank"] if restricted or "targets" in mask else []),
    ]


def _figures(found: dict[str, Any], fields: Sequence[str]) -> list[str]:
    values = [found[name] for name in fields]
    return [probability_text(value) if isinstance(value, float) else cell(value) for value in values]


def _parser() -> CommandParser:
    parser = CommandParser("fill-mask", __doc__)
    parser.add_argument("model", help="run folder, adapter or model: a folder or a hub name")
    parser.add_argument(
        "text", nargs="*", default=[], help="texts with masks; standard input, one per line, if none is given"
    )
    parser.add_argument(
        "--file",
        action="append",
        help="file of texts (txt, csv, jsonl, FASTA, ...), or a quoted glob; may be given several times",
    )
    parser.add_argument("--text_column", help="column of the file that holds the texts")
    parser.add_argument("--top_k", type=int, default=5, help="tokens per mask (default 5)")
    parser.add_argument(
        "--targets",
        action="append",
        metavar="WORD,WORD",
        help="words whose probability and rank are given at each mask; or a file with one a line",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORD,WORD",
        help="words among which alone the prediction is made; or a file with one a line. The probability among all "
        "tokens is given, and the one among these",
    )
    parser.add_argument(
        "--max_tokens_per_batch", type=int, help="tokens of a batch of texts (default 4096 on a CPU, 32768 elsewhere)"
    )
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the adapter was trained on another base")
    parser.add_argument("--use_base", action="store_true", help="leave the adapter out")
    parser.add_argument("--with_base", action="store_true", help="show the base beside the run or adapter")
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
