"""`peft-mlm evaluate`: loss, perplexity and masked accuracy on held-out text, on masks that are always the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mlm.argument_types import convert, parse_type
from peft_mlm.config import describe_help, read_arguments
from peft_mlm.console import CommandParser, print_table, with_error
from peft_mlm.errors import ArgumentsError
from peft_mlm.model_checks import check_path
from peft_mlm.out_of_memory import memory_told
from peft_mlm.quantization_rules import QUANTISATION
from peft_mlm.run_folder import RunFolder, is_run_folder


def evaluate(
    name_or_path: str,
    *,
    config: str | Path | None = None,
    flags: Sequence[str] = (),
    base: str | None = None,
    any_base: bool = False,
    use_base: bool = False,
) -> dict[str, Any]:
    """Evaluate a base, an adapter or a merged model.

    Args:
        name_or_path: A run folder, an adapter or a model (a folder or a hub name).
        config: File with the arguments that say on which text and how; the run's own where there is one.
        flags: Words of a command line that override it, such as `["--validation_file", "other.txt"]`.
        base: Base model, if it is not the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.
        use_base: Evaluate the base, without adapter or training.

    Returns:
        `model`, `part` ("adapted", "base" or "model"), `loss`, `loss_standard_error`, `perplexity`, `accuracy`,
        `accuracy_standard_error`, `top5_accuracy`, `masked_tokens`, `rows`, and `data` (facts about the text).

    Raises:
        ArgumentsError: Arguments are wrong, or name no text.
        DataError: The text is missing or empty.
        ModelError: The model cannot be loaded, or has no masked LM head.
        AdapterError: The adapter does not fit its base.
    """
    check_path(name_or_path)
    if config is None and is_run_folder(Path(name_or_path).expanduser()):
        config = RunFolder(Path(name_or_path).expanduser()).arguments
    if config is not None or flags:
        from peft_mlm.text_files import find_files

        find_files(read_arguments(config, flags, for_training=False).data.validation_file or ())

    from peft_mlm.data import load_text
    from peft_mlm.evaluation import evaluation_arguments, how_to_load, ready_to_measure
    from peft_mlm.loading import load_target, resolve_target, with_quantisation

    target = resolve_target(name_or_path, base=base, part="base" if use_base else "adapted")
    if config is None and target.run is not None:
        config = RunFolder(target.run).arguments
    if config is None and not flags:
        raise ArgumentsError(f"On which text? {name_or_path} is no run: give --validation_file or --dataset_name.")
    arguments = read_arguments(config, flags, for_training=False)
    quantisation = {name: getattr(arguments.model, name) for name in QUANTISATION}
    asked = any(arguments.sources[name] == "flag" for name in QUANTISATION)
    target = with_quantisation(target, quantisation if asked else {})
    target = replace(target, base=how_to_load(target.base, arguments, command="evaluate"))
    training, data = evaluation_arguments(arguments), arguments.data
    text = load_text(data, cache_dir=arguments.model.cache_dir, token=arguments.model.token, splits=("validation",))
    loaded = load_target(target, any_base=any_base)
    with memory_told(arguments, training=False):
        corpus, measure = ready_to_measure(loaded, text, arguments, training, label="evaluating")
        scores = measure()
    return {
        "model": name_or_path,
        "part": "base" if use_base else "model" if target.kind == "model" else "adapted",
        **scores.describe(),
        "rows": len(corpus.rows["validation"]),
        "data": corpus.facts["validation"],
    }


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    named, flags = words[:first_flag], words[first_flag:]
    if not 1 <= len(named) <= 2:
        raise ArgumentsError("Give a model (a run folder, an adapter, a model), and a config file if need be, first.")
    own, rest = _parser().parse_known_args(flags)
    config = named[1] if len(named) == 2 else None
    return evaluate(named[0], config=config, flags=rest, base=own.base, any_base=own.any_base, use_base=own.use_base)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    row = [
        record["part"],
        with_error(record["loss"], record["loss_standard_error"]),
        record["perplexity"],
        with_error(record["accuracy"], record["accuracy_standard_error"]),
        record["top5_accuracy"],
        record["masked_tokens"],
    ]
    header = ["", "loss", "perplexity", "masked accuracy", "top 5", "tokens"]
    print_table(record["model"], header, [row], stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm evaluate --help`."""
    usage = (
        "usage: peft-mlm evaluate MODEL [CONFIG] [--base NAME] [--any_base] [--use_base] [--argument value ...]\n"
        "                         [--json]\n\n"
        "MODEL is a run folder, an adapter or a model. A run knows its text; else give --validation_file or\n"
        "--dataset_name. --use_base leaves the adapter out; --base names another base model; --any_base takes\n"
        "it although the adapter was trained on one with other weights.\n"
    )
    return usage + "\n" + describe_help(("data", "training"))


def _parser() -> CommandParser:
    def truth(word: str) -> bool:
        return bool(convert(word, parse_type("bool")))

    parser = CommandParser("evaluate")
    parser.add_argument("--base")
    parser.add_argument("--any_base", nargs="?", type=truth, const=True, default=False)
    parser.add_argument("--use_base", nargs="?", type=truth, const=True, default=False)
    return parser
