"""`peft-mlm compare`: models on the same masked tokens, data set by data set: who is better, where, and how surely."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.comparison_tables import comparison_tables, csv_text, markdown_text
from peft_mlm.comparison_words import SUFFIXES, Named, named_files, read_name
from peft_mlm.config import Arguments, describe_help, read_arguments
from peft_mlm.console import CommandParser, print_table
from peft_mlm.errors import AdapterError, ArgumentsError, DataError, ModelError, RunFolderError
from peft_mlm.model_checks import check_path
from peft_mlm.out_of_memory import memory_told
from peft_mlm.quantization_rules import QUANTISATION
from peft_mlm.run_folder import RunFolder, is_run_folder, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_mlm.comparing import Measured, Resampling
    from peft_mlm.data import TextData
    from peft_mlm.loading import Target

FORMATS = (".json", ".csv", ".md")


@dataclass
class DataSet:
    """A text to compare on, and what the reference gave there.

    Attributes:
        name: Its name.
        arguments: All groups, with its files.
        text: The text.
        facts: Facts of its rows, once there are rows.
        reference: What the first model gave.
        models: A record for each model.
    """

    name: str
    arguments: Arguments
    text: TextData
    facts: dict[str, Any] | None = None
    reference: Measured | None = None
    models: list[dict[str, Any]] | None = None


def compare(
    models: Sequence[str],
    *,
    eval_files: Mapping[str, str] | Sequence[str] = (),
    config: str | Path | None = None,
    flags: Sequence[str] = (),
    base: str | None = None,
    any_base: bool = False,
    bootstrap: int = 2000,
    level: float = 0.95,
    bootstrap_seed: int = 0,
    top_tokens: int = 10,
    least_count: int = 5,
) -> dict[str, Any]:
    """Compare models on the same masked tokens.

    Args:
        models: Two or more runs, adapters or models (folders or hub names); the first is the reference. `:base` after
            one leaves the adapter (or the training) out, `:4bit` or `:8bit` loads a model or a base in fewer bits. A
            run or an adapter alone is compared with its base.
        eval_files: Text files by name of the data set, or words such as "domain=a.txt"; several files separated by
            commas. Without any, the text that `config` and `flags` name, as in `evaluate`.
        config: File with the arguments that say on which text and how; those of the first run among the models if None.
        flags: Words of a command line that override it, such as `["--max_eval_samples", "500"]`.
        base: Base model, if it is not the one that adapters record.
        any_base: Put adapters on a base with other weights than they were trained on.
        bootstrap: How often clusters are drawn for an interval.
        level: Share of such intervals that hold the true value.
        bootstrap_seed: Of the draws.
        top_tokens: How many tokens are listed that gained, and that lost most.
        least_count: Least number of times that such a token was masked.

    Returns:
        `reference`, `bootstrap` (`replicates`, `level`, `seed`), and `data_sets`: for each `name`, `rows`, `clusters`,
        `cluster` (what a cluster is), `mask_draws`, `data`, and `models`: for each `model`, `part`, `bits`, the figures
        of `evaluate`, and `against_reference` (None for the reference).

    Raises:
        ArgumentsError: Arguments are wrong, or name no text.
        DataError: A text is missing or empty, or models would read it differently.
        ModelError: A model cannot be loaded, has no masked LM head, or has another tokenizer than the first one.
        AdapterError: An adapter does not fit its base.
    """
    names = _with_base([models] if isinstance(models, str) else list(models))
    _check_numbers(bootstrap=bootstrap, level=level, top_tokens=top_tokens, least_count=least_count)
    files = named_files(eval_files)
    for name in names:
        check_path(name.path)
    _find_files(files)

    from peft_mlm.comparing import Resampling
    from peft_mlm.loading import load_target

    targets = [_resolve(name, base) for name in names]
    sets = _data_sets(files, _config_of(targets, config), flags)
    targets = [_to_load(name, target, sets[0].arguments) for name, target in zip(names, targets, strict=True)]
    resampling = Resampling(bootstrap, level, bootstrap_seed)
    tokenizer = None
    for place, (name, target) in enumerate(zip(names, targets, strict=True)):
        loaded = load_target(target, any_base=any_base)
        # Where the order of a sum depends on the place in memory, a model loaded twice differs from itself.
        again = place > 0 and (target.base, target.adapter) == (targets[0].base, targets[0].adapter)
        if tokenizer is None:
            tokenizer = loaded.tokenizer
        else:
            _check_tokenizer(names[0].word, tokenizer, name.word, loaded.tokenizer)
        record = {"model": name.word, "part": _part(name, target), "bits": _stored_bits(loaded)}
        for one in sets:
            _measure_on(one, loaded, record, resampling, top_tokens, least_count, again=again)
        del loaded
        gc.collect()  # one model in memory at a time
    return {
        "reference": names[0].word,
        "bootstrap": {"replicates": bootstrap, "level": level, "seed": bootstrap_seed},
        "data_sets": [{"name": one.name, **(one.facts or {}), "models": one.models} for one in sets],
    }


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    own, flags = _parser().parse_known_args(words[first_flag:])
    output = None if own.output_file is None else Path(own.output_file).expanduser()
    _check_output(output)
    record = compare(
        words[:first_flag],
        eval_files=own.eval_file,
        config=own.config,
        flags=flags,
        base=own.base,
        any_base=own.any_base,
        bootstrap=own.bootstrap,
        level=own.level,
        bootstrap_seed=own.bootstrap_seed,
        top_tokens=own.top_tokens,
        least_count=own.least_count,
    )
    if output is not None:
        _write(output, record)
        record["output_file"] = str(output)
    return record


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    for title, header, rows in comparison_tables(record):
        print_table(title, header, rows, stream=sys.stdout)
    if "output_file" in record:
        print(f"written to {record['output_file']}")


def help_text() -> str:
    """Give the text of `peft-mlm compare --help`."""
    return _parser().format_help() + "\n" + describe_help(("data", "training"))


def _with_base(words: list[str]) -> list[Named]:
    """Read the words that name models; one run or adapter alone is compared with its base."""
    names = [read_name(word) for word in words]
    if not names:
        raise ArgumentsError(
            "Give the models to compare first: two or more, or one run or adapter. The first one is the reference."
        )
    if len(names) > 1:
        return names
    (only,) = names
    if "base" in only.suffixes:
        raise ArgumentsError(f"{only.word} is one model: name another one to compare it with.")
    if not (is_run_folder(Path(only.path).expanduser()) or _is_adapter(only.path)):
        raise ArgumentsError(
            f"{only.word} is one whole model: name another one to compare it with. (A run or an adapter alone is "
            "compared with its base.)"
        )
    return [Named(f"{only.path}:base", only.path, ("base",)), only]


def _resolve(name: Named, base: str | None) -> Target:
    """Find out what a word names; another base is for what has a base."""
    from peft_mlm.loading import resolve_target

    part: Any = "base" if "base" in name.suffixes else "adapted"
    takes_base = part == "base" or (base is not None and _is_adapter(name.path))
    return resolve_target(name.path, base=base if takes_base else None, part=part)


def _to_load(name: Named, target: Target, arguments: Arguments) -> Target:
    """Say how a model is loaded: as flags say, and in the bits that its suffix asks for."""
    from peft_mlm.evaluation import how_to_load
    from peft_mlm.loading import with_quantisation

    target = replace(target, base=how_to_load(target.base, arguments, command="compare"))
    asked = {SUFFIXES[suffix]: True for suffix in name.suffixes if suffix != "base"}
    wanted = {option: getattr(arguments.model, option) for option in QUANTISATION}
    wanted |= {"load_in_4bit": False, "load_in_8bit": False, **asked}
    return with_quantisation(target, wanted if asked else {})


def _is_adapter(name_or_path: str) -> bool:
    from peft_mlm.loading import find_adapter

    path = Path(name_or_path).expanduser()
    if is_run_folder(path):
        return RunFolder(path).adapter.is_dir()
    try:
        find_adapter(name_or_path)
    except AdapterError:
        return False
    return True


def _check_numbers(*, bootstrap: int, level: float, top_tokens: int, least_count: int) -> None:
    faults = []
    if bootstrap < 100:
        faults.append(f"bootstrap is {bootstrap}: give 100 or more; 2000 is usual.")
    if not 0.5 <= level < 1:
        faults.append(f"level is {level:g}: give at least 0.5 and less than 1, such as 0.95.")
    if top_tokens < 0:
        faults.append(f"top_tokens is {top_tokens}: give 0 or more.")
    if least_count < 1:
        faults.append(f"least_count is {least_count}: give 1 or more.")
    if faults:
        raise ArgumentsError(faults)


def _find_files(files: Mapping[str, str]) -> None:
    if not files:
        return
    from peft_mlm.text_files import find_files

    for words in files.values():
        find_files(words.split(","))


def _config_of(targets: Sequence[Target], config: str | Path | None) -> str | Path | None:
    if config is not None:
        return config
    run = next((target.run for target in targets if target.run is not None), None)
    return None if run is None else RunFolder(run).arguments


def _data_sets(files: Mapping[str, str], config: str | Path | None, flags: Sequence[str]) -> list[DataSet]:
    from peft_mlm.data import load_text

    if config is None and not flags and not files:
        raise ArgumentsError("On which text? None of these is a run: give --eval_file NAME=FILE or --dataset_name.")
    words = [[*flags, "--validation_file", files_of] for files_of in files.values()] or [list(flags)]
    sets = []
    for name, of_set in zip(files or ["validation"], words, strict=True):
        arguments = read_arguments(config, of_set, for_training=False)
        model = arguments.model
        if idle := [f"--{bits}" for bits in ("load_in_4bit", "load_in_8bit") if arguments.sources[bits] == "flag"]:
            raise ArgumentsError(
                f"{', '.join(idle)}: write which model is loaded in fewer bits: MODEL:4bit, MODEL:8bit."
            )
        text = load_text(arguments.data, cache_dir=model.cache_dir, token=model.token, splits=("validation",))
        sets.append(DataSet(name, arguments, text))
    return sets


def _stored_bits(loaded: Any) -> int | None:
    quantisation = loaded.base.quantisation
    return None if quantisation is None else int(quantisation["bits"])


def _part(name: Named, target: Target) -> str:
    return "base" if "base" in name.suffixes else "model" if target.kind == "model" else "adapted"


def _check_tokenizer(
    first: str, tokenizer: PreTrainedTokenizerBase, second: str, other: PreTrainedTokenizerBase
) -> None:
    from peft_mlm.training_facts import tokenizer_fingerprint

    one, two = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)
    if differing := [name for name in one if one[name] != two[name]]:
        raise ModelError(
            f"{second} has another tokenizer than {first} (they differ in: {', '.join(differing)}): their masked "
            "tokens are not the same ones, and cannot be compared. Compare models of one tokenizer; where an adapter "
            "adds tokens, its base with these tokens is RUN:base."
        )


def _measure_on(
    one: DataSet,
    loaded: Any,
    record: dict[str, Any],
    resampling: Resampling,
    top_tokens: int,
    least_count: int,
    *,
    again: bool,
) -> None:
    """Measure a model on a data set, and compare it with the reference; `again` if it is the reference itself."""
    from peft_mlm.comparing import describe_paired, measured, same_tokens, tokens_that_changed
    from peft_mlm.evaluation import evaluation_arguments, ready_to_measure

    training = evaluation_arguments(one.arguments)
    if training.world_size > 1:
        raise ArgumentsError("compare runs in one process: start it without torchrun or accelerate launch.")
    corpus, measure = ready_to_measure(loaded, one.text, one.arguments, training, label=record["model"])
    length = corpus.max_seq_length
    if one.facts is not None and one.facts["data"]["max_seq_length"] != length:
        both = one.facts["data"]["max_seq_length"], length
        raise DataError(
            f"{record['model']} reads rows of {both[1]} tokens, and the reference of {both[0]}: their masked tokens "
            f"are not the same ones. Give both --max_seq_length {min(both)}."
        )
    with memory_told(one.arguments, training=False):
        found = one.reference if again and one.reference is not None else measured(measure)
    if one.reference is None:
        one.reference, one.models = found, []
        documents = "document_numbers" in corpus.rows["validation"].column_names
        one.facts = {
            "rows": len(corpus.rows["validation"]),
            "clusters": int((found.scores.counts > 0).sum()),
            "cluster": "text" if documents else "row",
            "mask_draws": one.arguments.data.eval_mask_draws,
            "data": corpus.facts["validation"],
        }
        against = None
    elif not same_tokens(one.reference, found):
        raise DataError(
            f"{record['model']} and the reference make different rows of {one.name}, so that their masked tokens are "
            "not the same ones: give --rows line, or another --rows that both take."
        )
    else:
        names = loaded.tokenizer.convert_ids_to_tokens
        against = {
            **describe_paired(one.reference, found, resampling),
            "tokens": tokens_that_changed(one.reference, found, names, most=top_tokens, least_count=least_count),
        }
    assert one.models is not None
    one.models.append({**record, **found.scores.describe(), "against_reference": against})


def _check_output(output: Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if output is None:
        return
    if output.suffix not in FORMATS:
        raise ArgumentsError(f"--output_file {output}: its name must end in one of {', '.join(FORMATS)}.")
    if output.exists():
        raise RunFolderError(f"{output} exists, and is not overwritten: choose another --output_file.")
    if not output.parent.is_dir():
        raise RunFolderError(f"--output_file: there is no folder {output.parent}. Make it first.")


def _write(output: Path, record: dict[str, Any]) -> None:
    _check_output(output)  # it may have come into being meanwhile
    if output.suffix == ".json":
        write_json(output, record)
    else:
        write_text(output, csv_text(record) if output.suffix == ".csv" else markdown_text(record))


def _parser() -> CommandParser:
    parser = CommandParser(
        "compare",
        f"{__doc__}\n\n"
        "MODEL is a run, an adapter, or a base or merged model; the first one is the reference. MODEL:base leaves the\n"
        "adapter (or the training) out; MODEL:4bit and MODEL:8bit load a model or a base in fewer bits. A run or an\n"
        "adapter alone is compared with its base. The text is that of the first run among them, unless --eval_file,\n"
        "--validation_file or --dataset_name name another; all arguments of `peft-mlm evaluate` may follow.",
    )
    parser.usage = "peft-mlm compare MODEL [MODEL ...] [--eval_file [NAME=]FILE ...] [--argument value ...] [--json]"
    parser.add_argument(
        "--eval_file",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a data set: its files (a glob, or separated by commas), and its name; may be repeated",
    )
    parser.add_argument("--config", help="file of arguments; those of the first run among the models if not given")
    parser.add_argument("--base", help="base model, if it is not the one that adapters record")
    parser.add_argument("--any_base", action="store_true", help="even if an adapter was trained on another base")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples for an interval (default 2000)")
    parser.add_argument("--level", type=float, default=0.95, help="level of the intervals (default 0.95)")
    parser.add_argument("--bootstrap_seed", type=int, default=0, help="seed of the resamples (default 0)")
    parser.add_argument("--top_tokens", type=int, default=10, help="tokens listed that gained and lost (default 10)")
    parser.add_argument("--least_count", type=int, default=5, help="... that were masked at least so often (default 5)")
    parser.add_argument("--output_file", help="file to write too: .json, .csv or .md; never overwritten")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
