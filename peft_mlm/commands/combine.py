"""`peft-mlm combine`: several adapters of one base -> one adapter, by what they add to the weights."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.combination_rules import METHODS, TRAINED_MODULES, Recipe, make_recipe, read_weights
from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import ArgumentsError
from peft_mlm.run_folder import check_new_folder, staged

if TYPE_CHECKING:
    from peft_mlm.adapter_sources import Source
    from peft_mlm.config import Arguments
    from peft_mlm.deltas import Parts
    from peft_mlm.derived_adapter import Derived
    from peft_mlm.loading import Loaded, Target

RECORD = "combination.json"
EVALUATIONS = 60


def combine(
    adapters: Sequence[str],
    output_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    trained_modules: str = "delta",
    base: str | None = None,
    any_base: bool = False,
    search: bool = False,
    search_evaluations: int = EVALUATIONS,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Combine LoRA adapters of one base into one.

    Args:
        adapters: Run folders, or adapters (folders or hub names).
        output_dir: Folder to make; it must not exist, or be empty.
        weights: One for each adapter; a negative one takes away what it has learned. By default equal: 1 / count, or 1
            for the methods that average by themselves (ties, dare_ties). With `search` the first ones tried.
        method: cat (the exact sum, of the ranks' sum; the default), svd (its best approximation of `rank`; the default
            with a rank), linear (the exact sum, of no higher rank than it has), ties, dare_linear, dare_ties or
            magnitude_prune.
        rank: Rank of each layer of the result; for sparse methods the ranks' sum if None.
        density: Share of the entries that a sparse method keeps.
        seed: Decides which entries DARE drops.
        trained_modules: What becomes of modules that were trained in full: "delta" (base + weighted differences; the
            base is loaded), "average" or "first".
        base: Base model, where values of it are needed, if it is not the recorded one.
        any_base: Combine adapters of bases with different weights.
        search: Find the weights of the lowest loss on an evaluation text.
        search_evaluations: How often `search` may evaluate.
        flags: With `search`, words of a command line that say on which text, such as
            `["--validation_file", "other.txt"]`.

    Returns:
        `output_dir`, `bytes`, and the record that is written beside the adapter as combination.json: `adapters`,
        `method`, `weights`, `rank`, `density`, `seed`, `trained_modules`, `relative_error`, `largest_relative_error`,
        `matrices`, `layers`, `ranks`, `parameters`, `trained_parameters`, `token_rows`, `search`.

    Raises:
        AdapterError: An adapter is not plain LoRA, or they are not for one base; nothing is written then.
        ArgumentsError: The arguments do not go together.
        RunFolderError: `output_dir` is not empty, or cannot be made.
    """
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    recipe = make_recipe(
        len(names), method=method, weights=weights, rank=rank, density=density, seed=seed,
        trained_modules=trained_modules,
    )  # fmt: skip
    output = Path(output_dir).expanduser()
    check_new_folder(output)
    text = _text_to_search_on(flags, search_evaluations, len(names)) if search else None
    if flags and not search:
        raise ArgumentsError(f"{flags[0]} says on which text to search: add --search, or leave it out.")
    from peft_mlm.adapter_sources import check_lora_bias, check_one_base, common_tokenizer, open_source, read_sources
    from peft_mlm.combining import combine_parts
    from peft_mlm.derived_adapter import describe_losses, describe_parts, write_derived
    from peft_mlm.loading import Target

    sources = [open_source(name) for name in names]
    check_one_base(sources, any_base=any_base)
    parts = read_sources(sources)
    check_lora_bias(sources, parts)
    tokenizer = common_tokenizer(sources)
    values, fresh = _base_values(names[0], sources, parts, recipe, base, any_base)
    found = None
    if text is not None:
        start = Target("adapter", _base_arguments(names[0], sources, base), None, None, None)
        found = _search(
            start, sources, parts, recipe, values, fresh, text, any_base=any_base, evaluations=search_evaluations
        )
        recipe = replace(recipe, weights=tuple(found["weights"]))
    combined = combine_parts(parts, recipe, values, fresh=fresh)
    record = {
        "adapters": [source.describe() for source in sources],
        **vars(recipe),
        **describe_losses(combined.losses),
        **describe_parts(combined.parts),
        "search": found,
    }
    with staged(output.resolve()) as folder:
        size = write_derived(_derived(sources, combined.parts, tokenizer, record), folder)
    return {"output_dir": str(output), "bytes": size, **record}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    named, flags = _own_words(words)
    given = _parser().read(named)
    if flags and not given.search:
        _parser().error(f"{flags[0]}: there is no such argument without --search")
    return combine(
        given.adapters,
        given.output_dir,
        weights=read_weights(given.weights),
        method=given.method,
        rank=given.rank,
        density=given.density,
        seed=given.seed,
        trained_modules=given.trained_modules,
        base=given.base,
        any_base=given.any_base,
        search=given.search,
        search_evaluations=given.search_evaluations,
        flags=flags,
    )


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        [adapter["name"], f"{weight:g}"] for adapter, weight in zip(record["adapters"], record["weights"], strict=True)
    ]
    print_table(f"combined by {record['method']}", ["adapter", "weight"], rows, stream=sys.stdout)
    low, high = record["ranks"]
    facts = [
        ["written to", f"{record['output_dir']} ({bytes_text(record['bytes'])})"],
        ["rank", f"{low}" if low == high else f"{low} to {high}"],
        ["lost by the cut to it", f"{record['relative_error']:.2%} of the sum (Frobenius norm)"],
        ["  the worst matrix", f"{record['largest_relative_error']:.2%}"],
    ]
    print_table("", None, facts if record["method"] != "cat" else facts[:2], stream=sys.stdout)
    if (search := record["search"]) is not None:
        tried = [
            [name, ", ".join(f"{w:g}" for w in point["weights"]), point["loss"], point["perplexity"], point["accuracy"]]
            for name, point in search["points"].items()
        ]
        header = ["", "weights", "loss", "perplexity", "masked accuracy"]
        print_table(f"search, {search['evaluations']} evaluations", header, tried, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm combine --help`."""
    methods = "\n".join(f"  {name:<16} {row.about}" for name, row in METHODS.items())
    modules = "\n".join(f"  {name:<16} {about}" for name, about in TRAINED_MODULES.items())
    return (
        f"{_parser().format_help()}\nmethods (all on the changes of the weights, s B A):\n{methods}\n\n"
        f"trained_modules:\n{modules}\n\n"
        "With --search any argument of `peft-mlm evaluate` that says on which text may follow, such as\n"
        "--validation_file.\n"
    )


def _base_values(
    name: str,
    sources: Sequence[Source],
    parts: Sequence[Parts],
    recipe: Recipe,
    base: str | None,
    any_base: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Load the base's values of the parameters that adapters put others in place of, where combining needs them.

    Gives them by name, and the names of those that the base does not have of its own.
    """
    from peft_mlm.combining import needs_base
    from peft_mlm.loading import check_base
    from peft_mlm.model import load_base

    if not needs_base(parts, recipe):
        return {}, []
    loaded = load_base(_base_arguments(name, sources, base))
    for source in sources:
        check_base(source.folder, loaded, any_base=any_base)
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    fresh = {id(parameters[name]) for name in loaded.fresh_parameters}
    wanted = {name for adapter in parts for name in adapter.whole}
    wanted |= {f"{layer}.bias" for adapter in parts for layer in adapter.changes}
    values = {name: parameters[name].detach() for name in wanted & parameters.keys()}
    return values, [name for name in values if id(parameters[name]) in fresh]


def _base_arguments(name: str, sources: Sequence[Source], base: str | None) -> Any:
    """Say how the base of the first adapter is loaded; with its own tokenizer."""
    from peft_mlm.base_recipe import with_base_recipe
    from peft_mlm.loading import resolve_target

    arguments = resolve_target(name, base=base).base
    arguments = replace(arguments, tokenizer_name=None, add_tokens=None, add_special_tokens=None, dtype="float32")
    return with_base_recipe(arguments, sources[0].folder)


def _text_to_search_on(flags: Sequence[str], evaluations: int, count: int) -> Arguments:
    """Read the arguments that say on which text to search, and how."""
    from peft_mlm.argument_fields import argument_fields
    from peft_mlm.config import read_arguments

    arguments = read_arguments(None, flags, for_training=False)
    given = [name for name, source in arguments.sources.items() if source == "flag"]
    if idle := [name for name in given if argument_fields()[name].group in ("model", "peft")]:
        raise ArgumentsError(f"--{', --'.join(idle)}: combine loads the base as its adapters say, and takes none here.")
    if evaluations < count + 3:
        raise ArgumentsError(f"search_evaluations is {evaluations}: {count} adapters need at least {count + 3}.")
    return arguments


def _search(
    start: Target,
    sources: Sequence[Source],
    parts: Sequence[Parts],
    recipe: Recipe,
    values: Mapping[str, Any],
    fresh: Sequence[str],
    text: Arguments,
    *,
    any_base: bool,
    evaluations: int,
) -> dict[str, Any]:
    """Find the weights of the lowest loss on a text, and say what was tried."""
    from peft import set_peft_model_state_dict

    from peft_mlm.adapter_sources import common_tokenizer
    from peft_mlm.combining import combine_parts
    from peft_mlm.deltas import state_of
    from peft_mlm.derived_adapter import write_derived
    from peft_mlm.loading import load_target
    from peft_mlm.weight_search import search_weights

    # while searching, the sum keeps one rank whatever the weights are
    tried_by = replace(recipe, method="cat") if recipe.method == "linear" else recipe
    first = combine_parts(parts, tried_by, values, fresh=fresh).parts
    with tempfile.TemporaryDirectory() as nowhere:
        write_derived(_derived(sources, first, common_tokenizer(sources), {}), Path(nowhere))
        loaded = load_target(replace(start, adapter=Path(nowhere)), any_base=any_base)
    measure = _measure(loaded, text)
    scores: dict[tuple[float, ...], dict[str, Any]] = {}

    def loss(weights: tuple[float, ...]) -> float:
        combined = combine_parts(parts, replace(tried_by, weights=weights), values, fresh=fresh)
        set_peft_model_state_dict(loaded.model, state_of(combined.parts))
        scores[weights] = measure()
        return float(scores[weights]["loss"])

    count = len(parts)
    alone = [tuple(float(i == place) for i in range(count)) for place in range(count)]
    equal = (1 / count,) * count
    starts = list(dict.fromkeys([*alone, equal, (1.0,) * count, recipe.weights]))
    averages = any(adapter.rows for adapter in parts) or recipe.trained_modules == "average"
    done = search_weights(loss, starts, evaluations=evaluations, lowest=0.0 if averages else None)
    points = {} if averages else {"base": (0.0,) * count}
    for place, point in enumerate(alone):
        same = [source.name for source in sources].count(sources[place].name) > 1
        points[f"{sources[place].name} ({place + 1})" if same else sources[place].name] = point
    points |= {"equal": equal, "found": done.best}
    for point in points.values():
        if point not in scores:
            loss(point)
    files = [Path(file).name for file in text.data.validation_file or text.data.train_file or []]
    return {
        "weights": list(done.best),
        "text": files or text.data.dataset_name,
        "evaluations": len(done.tried),
        "finished": done.finished,
        "points": {label: {"weights": list(point), **scores[point]} for label, point in points.items()},
    }


def _measure(loaded: Loaded, arguments: Arguments) -> Callable[[], dict[str, Any]]:
    """Make the function that measures the model as it is, on the text that the arguments name."""
    from peft_mlm.data import load_text
    from peft_mlm.evaluation import evaluation_arguments, ready_to_measure

    model, training = arguments.model, evaluation_arguments(arguments)
    text = load_text(arguments.data, cache_dir=model.cache_dir, token=model.token, splits=("validation",))
    _, measure = ready_to_measure(loaded, text, arguments, training, label="searching")
    return lambda: measure().describe()


def _derived(sources: Sequence[Source], parts: Parts, tokenizer: Any, record: Mapping[str, Any]) -> Derived:
    from peft_mlm.adapter_sources import base_name, loads_plainly
    from peft_mlm.arguments import ModelArguments
    from peft_mlm.base_recipe import with_base_recipe
    from peft_mlm.derived_adapter import Derived

    shown, revision = base_name(sources)
    about = []
    if record:
        pairs = zip(record["adapters"], record["weights"], strict=True)
        terms = "; ".join(f"{adapter['name']} with weight {weight:g}" for adapter, weight in pairs)
        about = [f"Combined by the method {record['method']} from these adapters: {terms}."]
        if record["relative_error"]:
            about += ["", f"The cut to its rank has lost {record['relative_error']:.2%} of the sum (Frobenius norm)."]
    return Derived(
        parts=parts,
        base_name=shown,
        base_revision=revision,
        base_arguments=with_base_recipe(ModelArguments(), sources[0].folder),
        fingerprint=next((source.fingerprint for source in sources if source.fingerprint is not None), None),
        tokenizer=tokenizer,
        title="Combined adapter for masked language modelling",
        about=about,
        record=record,
        record_name=RECORD,
        plain=loads_plainly(sources),
    )


def _own_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the command's own words from the flags that say on which text to search."""
    own = {option for action in _parser()._actions for option in action.option_strings}
    mine: list[str] = []
    flags: list[str] = []
    into = mine
    for word in words:
        if word.startswith("--"):
            into = mine if word.partition("=")[0] in own else flags
        into.append(word)
    return mine, flags


def _parser() -> CommandParser:
    parser = CommandParser("combine", __doc__)
    parser.add_argument("adapters", nargs="+", help="run folders, or adapters (folders or hub names), of one base")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--weights", help="one number for each, separated by commas (default: equal)")
    parser.add_argument("--method", help="cat (default), svd (default with --rank), or another of those below")
    parser.add_argument("--rank", type=int, help="rank of each layer of the result")
    parser.add_argument("--density", type=float, help="share of the entries that a sparse method keeps")
    parser.add_argument("--seed", type=int, default=0, help="for what DARE draws (default 0)")
    parser.add_argument("--trained_modules", default="delta", help="what becomes of modules trained in full (below)")
    parser.add_argument("--base", help="base model, where it is needed, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if the bases have different weights")
    parser.add_argument("--search", action="store_true", help="find the weights of the lowest loss on a text")
    parser.add_argument(
        "--search_evaluations", type=int, default=EVALUATIONS, help=f"evaluations at most (default {EVALUATIONS})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
