"""`peft-mlm score`: how probable a model finds texts, or mutations of a protein.

Texts get their pseudo-log-likelihood and pseudo-perplexity (Salazar et al. 2020): each token masked in turn. With
--sequence, FILE is a table of mutations (A123V, several as A123V:D200N), which get their masked marginals, or the
marginals of the wild type (Meier et al. 2021). Results may go into a file; a job that was stopped goes on there.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.console import CommandParser, few_names, print_table
from peft_mlm.errors import ArgumentsError, DataError, DeviceMemoryError
from peft_mlm.model_checks import check_path
from peft_mlm.out_of_memory import is_out_of_memory
from peft_mlm.result_file import check_result_file, open_results
from peft_mlm.score_input import number_of, read_input, read_measured, read_wild_type

if TYPE_CHECKING:
    from peft_mlm.loading import Loaded, Target
    from peft_mlm.result_file import ResultFile
    from peft_mlm.scoring import ScoreOptions, Work
    from peft_mlm.text_files import TextRows

METHODS = ("pseudo_likelihood", "masked_marginal", "wild_type_marginal")
VARIANTS = ("original", "within_word_l2r", "whole_word")
# Figures over all rows, as they are shown.
FIGURES = ("scored_tokens", "unknown_tokens", "pseudo_perplexity", "base_pseudo_perplexity")
ROWS_SHOWN = 20
TEXT_SHOWN = 30
logger = logging.getLogger("peft_mlm")


@dataclass(frozen=True)
class Job:
    """What is scored, and how.

    Attributes:
        table: The input.
        options: How it is scored.
        measured: Measured values, nan where there is none; None where they are not asked for.
        measured_column: Their column.
        columns: Columns of the results.
    """

    table: TextRows
    options: ScoreOptions
    measured: list[float] | None
    measured_column: str | None
    columns: list[str]


def score(
    name_or_path: str,
    texts: str | Sequence[str] | None = None,
    *,
    file: str | Path | None = None,
    text_column: str | None = None,
    method: str | None = None,
    variant: str = "original",
    truncate: bool = False,
    token_scores: bool = False,
    sequence: str | None = None,
    offset: int = 0,
    measured: str | None = None,
    output_file: str | Path | None = None,
    max_tokens_per_batch: int | None = None,
    with_base: bool = False,
    base: str | None = None,
    any_base: bool = False,
    use_base: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> dict[str, Any]:
    """Score texts, or mutations of a protein.

    Args:
        name_or_path: A run folder, an adapter or a model (a folder or a hub name).
        texts: Texts, or mutations such as A123V; or give `file`.
        file: A file of them (or a glob): csv, tsv, json, jsonl, txt, parquet or FASTA, plain or compressed. Its other
            columns are kept.
        text_column: Column of the texts or mutations, if it is not told by its name or by being the only one.
        method: "pseudo_likelihood", "masked_marginal" or "wild_type_marginal"; by default the first, and with a
            sequence the second.
        variant: What pseudo-likelihoods mask with a token: "original", "within_word_l2r" or "whole_word".
        truncate: Cut texts that are longer than the model holds, instead of refusing them.
        token_scores: Give the log probability of each token too.
        sequence: The wild type of mutations: residues, or a FASTA file of one sequence.
        offset: What is added to a residue's place in the sequence to give its number in a mutation.
        measured: Column of measured values, which the scores' ranks are correlated with (Spearman).
        output_file: A .csv, .tsv or .jsonl file for the results. The same job again goes on with it.
        max_tokens_per_batch: Rows times their length, at most. Default 4096 on a CPU, 32768 on a GPU.
        with_base: Score the base beside the adapter, and give the difference.
        base: Base model, if it is not the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.
        use_base: Leave the adapter out.
        load_in_4bit: Load a model, or the base, in 4 bits (nf4).
        load_in_8bit: The same in 8 bits.

    Returns:
        `model`, `part`, `method`, `variant`, `rows`; for texts `scored_tokens`, `unknown_tokens`, `pseudo_perplexity`
        (over all tokens) and `base_pseudo_perplexity`; `spearman` (`measured`, `rho`, `pairs`, `tied`, `base_rho`) or
        None; `output_file`, and without one `results`: a dict for each row.

    Raises:
        ArgumentsError: Arguments do not go together.
        DataError: The text or the mutations cannot be read or scored.
        RunFolderError: `output_file` is in the way.
    """
    method = method or ("masked_marginal" if sequence else "pseudo_likelihood")
    _check_arguments(method, variant, sequence, with_base=with_base, use_base=use_base, tokens=max_tokens_per_batch)
    check_path(name_or_path)
    output = None if output_file is None else Path(output_file).expanduser()
    if output is not None:
        check_result_file(output, {"method": method})
    table = read_input(texts, file, text_column, mutations=sequence is not None)
    values = read_measured(table, measured)
    wild_type = "" if sequence is None else read_wild_type(sequence)

    from peft_mlm.loading import load_target, resolve_target, with_quantisation
    from peft_mlm.scoring import ScoreOptions, columns_of

    options = ScoreOptions(method, variant, truncate, token_scores, wild_type, offset, max_tokens_per_batch)
    added = columns_of(options, with_base=with_base)
    if clash := [name for name in added if name in table.columns]:
        raise ArgumentsError(f"The input has the columns {', '.join(clash)} already, which scoring adds: rename them.")
    job = Job(table, options, values, measured, [*table.columns, *added])
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    target = resolve_target(name_or_path, base=base, part="base" if use_base else "adapted")
    target = with_quantisation(target, bits if load_in_4bit or load_in_8bit else {})
    beside = [_base_of(target, name_or_path, base)] if with_base else []
    models = [load_target(target, any_base=any_base), *(load_target(one) for one in beside)]
    with _memory_told(models[0], options):
        record = _score(models, job, output)
    part = "base" if use_base else "model" if target.kind == "model" else "adapted"
    return {"model": name_or_path, "part": part, **record}


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    if given.mutation and given.sequence is None:
        raise ArgumentsError("--mutation wants the protein it is a mutation of: give its residues by --sequence.")
    texts = [*given.text, *given.mutation]
    if given.file is None and not texts:
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise DataError("There is nothing to score: name a file after the model, or give --text or standard input.")
    names = (
        "file", "text_column", "method", "variant", "truncate", "token_scores", "sequence", "offset", "measured",
        "output_file", "max_tokens_per_batch", "with_base", "base", "any_base", "use_base", "load_in_4bit",
        "load_in_8bit",
    )  # fmt: skip
    return score(given.model, texts or None, **{name: getattr(given, name) for name in names})


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    if record.get("results") is not None:
        _show_rows(record["results"])
    facts = [["rows", record["rows"]]]
    facts += [[name.replace("_", " "), record[name]] for name in FIGURES if record.get(name) is not None]
    if record["spearman"] is not None:
        found = record["spearman"]
        facts.append([f"Spearman's rho with {found['measured']} ({found['pairs']} rows)", found["rho"]])
    if record["output_file"] is not None:
        facts.append(["written to", record["output_file"]])
    print_table("", None, facts, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm score --help`."""
    return _parser().format_help()


def _score(models: list[Loaded], job: Job, output: Path | None) -> dict[str, Any]:
    """Score all rows that are not scored yet, and sum up."""
    from peft_mlm.run_folder import describe_environment
    from peft_mlm.scoring import describe_job, plan_work
    from peft_mlm.trainer import device_name

    plans = [plan_work(loaded, job.table.texts, job.options) for loaded in models]
    if output is None:
        records = _rows(models[0], plans, job, None)
        return {**_sum_up(records, job), "output_file": None, "results": records}
    described = describe_job(models, job.table.rows, job.table.texts, job.options)
    about = {"environment": describe_environment(device_name(models[0].model.device))}
    with open_results(output, described, job.columns, about) as results:
        if results.summary is None:
            summary = _sum_up(_rows(models[0], plans, job, results), job)
            results.finish(summary)
        else:
            logger.info("%s has all its results already: nothing was run.", output)
            # Measured values are no part of the job: it may be asked again with others.
            summary = _sum_up(results.read(), job)
    return {**summary, "output_file": str(output)}


def _rows(main: Loaded, plans: list[Work], job: Job, results: ResultFile | None) -> list[dict[str, Any]]:
    """Run the steps that are left; give the rows of all."""
    from tqdm import tqdm

    from peft_mlm.scoring import steps, tokens_per_step

    done = 0 if results is None else results.rows
    records = results.read() if results is not None and done else []
    if done:
        logger.info("%d of %d rows are scored already: going on from there.", done, len(job.table.texts))
    ranges = list(steps(plans[0].tokens, tokens_per_step(main)))
    asks = [sum(plan.asks(rows) for plan in plans) for rows in ranges]
    before = sum(count for rows, count in zip(ranges, asks, strict=True) if rows.stop <= done)
    with tqdm(
        total=sum(asks), initial=before, desc="scoring", unit="mask", file=sys.stderr, leave=False, disable=None
    ) as bar:
        for rows in ranges:
            if rows.stop <= done:
                continue
            parts = [plan.score(rows, bar.update) for plan in plans]
            step = [
                {**job.table.rows[row], **_beside([part[place] for part in parts], job.options)}
                for place, row in enumerate(rows)
            ]
            records += step
            if results is not None:
                results.append(step)
    return records


def _beside(found: list[dict[str, Any]], options: ScoreOptions) -> dict[str, Any]:
    """Put the base's score beside the adapter's."""
    if len(found) == 1:
        return found[0]
    own, base = (one[options.score] for one in found)
    return {**found[0], f"base_{options.score}": base, f"{options.score}_change": own - base}


def _sum_up(records: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Sum up rows, which may come from a csv file, where all values are strings."""
    from peft_mlm.pseudo_likelihood import pseudo_perplexity
    from peft_mlm.rank_correlation import spearman

    scores = [number_of(record[job.options.score]) for record in records]
    summary: dict[str, Any] = {"method": job.options.method, "variant": None, "rows": len(records)}
    if job.options.method == "pseudo_likelihood":
        counts = {name: sum(int(record[name]) for record in records) for name in ("scored_tokens", "unknown_tokens")}
        summary |= {"variant": job.options.variant, **counts}
        summary["pseudo_perplexity"] = pseudo_perplexity(math.fsum(scores), counts["scored_tokens"])
        if f"base_{job.options.score}" in job.columns:
            base = math.fsum(number_of(record[f"base_{job.options.score}"]) for record in records)
            summary["base_pseudo_perplexity"] = pseudo_perplexity(base, counts["scored_tokens"])
        _tell_of_texts(records, counts["unknown_tokens"])
    summary["spearman"] = None
    if job.measured is not None:
        names = [job.options.score] + [f"base_{job.options.score}"] * (f"base_{job.options.score}" in job.columns)
        found = [spearman([number_of(record[name]) for record in records], job.measured) for name in names]
        summary["spearman"] = {
            "measured": job.measured_column,
            "rho": found[0].rho,
            "pairs": found[0].pairs,
            "tied": list(found[0].tied),
            **({"base_rho": found[1].rho} if len(found) > 1 else {}),
        }
    return summary


def _tell_of_texts(records: list[dict[str, Any]], unknown: int) -> None:
    empty = [number for number, record in enumerate(records, 1) if int(record["scored_tokens"]) == 0]
    if empty:
        logger.info("No token to score: row %s.", few_names([str(number) for number in empty]))
    if unknown:
        logger.info("%d tokens are unknown to the model, and are not scored.", unknown)
    if cut := sum(int(record.get("cut_tokens") or 0) > 0 for record in records):
        logger.info("%d texts were cut off where the model holds no more.", cut)


def _check_arguments(
    method: str, variant: str, sequence: str | None, *, with_base: bool, use_base: bool, tokens: int | None
) -> None:
    faults = []
    if method not in METHODS:
        faults.append(f"method is {method!r}: choose one of {', '.join(METHODS)}.")
    elif (method != "pseudo_likelihood") != (sequence is not None):
        faults.append(
            "Mutations want the protein that they change: give its residues, or a FASTA file, by --sequence."
            if sequence is None
            else "--sequence is for the marginals of mutations, not for pseudo_likelihood: leave one of them out."
        )
    if variant not in VARIANTS:
        faults.append(f"variant is {variant!r}: choose one of {', '.join(VARIANTS)}.")
    elif variant != "original" and method != "pseudo_likelihood":
        faults.append(f"variant {variant} is one of pseudo-likelihoods: leave it out for mutations.")
    if with_base and use_base:
        faults.append("--use_base scores the base alone, --with_base both: choose one.")
    if tokens is not None and tokens < 1:
        faults.append(f"max_tokens_per_batch is {tokens}: give 1 or more.")
    if faults:
        raise ArgumentsError(faults)


def _base_of(target: Target, name: str, base: str | None) -> Target:
    """The base of an adapter alone, quantised as it is under the adapter; of a trained model, what it started from."""
    from peft_mlm.loading import resolve_target

    if target.adapter is None and target.run is None:
        raise ArgumentsError(f"--with_base: {name} is a model without adapter, with no base beside it.")
    return resolve_target(name, base=base, part="base")


@contextmanager
def _memory_told(loaded: Loaded, options: ScoreOptions) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        from peft_mlm.masked_rows import batch_tokens

        fewer = (options.max_tokens_per_batch or batch_tokens(loaded.model)) // 2
        raise DeviceMemoryError(
            f"The memory is too small: {' '.join(str(error).split()).split('. ')[0]}. What takes less: "
            f"--max_tokens_per_batch {fewer}; --load_in_8bit."
        ) from error


def _show_rows(results: list[dict[str, Any]]) -> None:
    hidden = {"tokens", "log_probabilities"}
    hidden |= {name for name in ("unknown_tokens", "cut_tokens") if not any(row.get(name) for row in results)}
    columns = [name for name in results[0] if name not in hidden]
    rows = []
    for record in results[:ROWS_SHOWN]:
        cells = [record.get(name) for name in columns]
        rows.append([f"{c[:TEXT_SHOWN]}..." if isinstance(c, str) and len(c) > TEXT_SHOWN else c for c in cells])
    print_table("", [name.replace("_", " ") for name in columns], rows, stream=sys.stdout)
    if len(results) > ROWS_SHOWN:
        print(f"... {len(results) - ROWS_SHOWN} more rows: --output_file or --json gives all.")


def _parser() -> CommandParser:
    parser = CommandParser("score", __doc__)
    add = parser.add_argument
    add("model", help="run folder, adapter or model: a folder or a hub name")
    add("file", nargs="?", help="texts or mutations: csv, tsv, json, jsonl, txt, parquet or FASTA, or a glob")
    add("--text", action="append", default=[], help="a text, in place of FILE; may be given several times")
    add("--text_column", help="column of the texts or mutations, if its name does not tell")
    add("--method", choices=METHODS, help="default: pseudo_likelihood; with --sequence, masked_marginal")
    add(
        "--variant",
        default="original",
        choices=VARIANTS,
        help="what is masked with a token: nothing else, the rest of its word, or all of its word (default original)",
    )
    add("--truncate", action="store_true", help="cut texts that are longer than the model holds")
    add("--token_scores", action="store_true", help="give each token's log probability too")
    add("--sequence", help="the protein that mutations change: its residues, or a FASTA file of one sequence")
    add("--mutation", action="append", default=[], help="a mutation, such as A123V, in place of FILE; several times")
    add("--offset", type=int, default=0, help="number of the residue before the sequence's first one (default 0)")
    add("--measured", help="column of measured values, to correlate ranks with (Spearman)")
    add("--output_file", help="a .csv, .tsv or .jsonl file for the results; the same command goes on with it")
    add("--max_tokens_per_batch", type=int, help="default 4096 on a CPU, 32768 on a GPU")
    add("--with_base", action="store_true", help="score the base beside the adapter, and give the difference")
    add("--base", help="base model, if it is not the recorded one")
    add("--any_base", action="store_true", help="even if the adapter was trained on another base")
    add("--use_base", action="store_true", help="leave the adapter out")
    add("--load_in_4bit", action="store_true", help="load the model, or the base, in 4 bits (nf4)")
    add("--load_in_8bit", action="store_true", help="the same in 8 bits")
    add("--json", action="store_true", help="print one JSON object")
    return parser
