"""The records of runs -> the facts of a report: values, what was adapted, text, memory, environment, arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_mlm.console import bytes_text, cell
from peft_mlm.report_content import (
    Record,
    Section,
    Table,
    adapter_of,
    argument_text,
    class_text,
    date_text,
    length_classes,
    median_speed,
    seconds_text,
    side_by_side,
    source_name,
    splits_of,
    value_text,
    with_interval,
)
from peft_mlm.run_record import figure, number, table

# A table of logs has at most this many rows.
MOST_LOGS = 60
LOGGED = (("loss", "loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"),
          ("tokens_per_second", "tokens/s"), ("peak_memory_bytes", "peak memory"), ("epoch", "epoch"))  # fmt: skip
EVALUATED = (("loss", "loss"), ("perplexity", "perplexity"), ("accuracy", "masked accuracy"),
             ("top5_accuracy", "among the first 5"))  # fmt: skip
# Fact -> what it is called.
OF_TEXT = {
    "source": "source",
    "origin": "how it was split off",
    "texts": "texts",
    "empty": "empty texts, left out",
    "also_in_train": "texts that also stand in the training text",
    "text_tokens": "tokens of the texts",
    "unknown_share": "of these unknown to the tokenizer",
    "median": "tokens of a text, median",
    "longest_text": "tokens of the longest text",
    "max_seq_length": "tokens that a row holds",
    "rows": "rows",
    "rows_used": "rows used",
    "tokens": "tokens in the rows",
    "fill_rate": "how full the rows are",
    "cut_texts": "texts cut into pieces",
    "lost": "tokens lost",
    "fingerprint": "fingerprint",
}
# These stand there only where they are not 0.
ONLY_SOME = ("empty", "cut_texts")


def logged_values(runs: Sequence[Record]) -> Section | None:
    """List what was logged and evaluated, in words for who does not see the pictures.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section, to which the pictures of the curves belong; None where nothing was logged.
    """
    tables = [
        Table(f"{name}{of}", header, rows, folded=True)
        for run in runs
        for name, (header, rows) in (("Evaluations", _evaluations(run)), ("Logs", _logs(run)))
        for of in [f" of {run['name']}" if len(runs) > 1 else ""]
        if rows
    ]
    return Section("Curves", (), tuple(tables), place="curves") if tables else None


def what_was_adapted(runs: Sequence[Record]) -> Section:
    """Say what of the model was trained, and where the adapter changes it most.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section.
    """
    columns = [_adapted(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    tables = [_across("Model and adapter", runs, names, columns)]
    for run in runs:
        changes = table(run, "adapter").get("largest_changes") or []
        rows = tuple((str(layer["name"]), cell(layer["delta_norm"])) for layer in changes)
        if rows:
            of = f" by {run['name']}" if len(runs) > 1 else ""
            few = f"the {len(rows)} largest of {cell(run['adapter']['layers'])}"
            header = ("layer", "norm of the change")
            tables.append(Table(f"Changes of the weights{of}, {few}", header, rows, folded=len(runs) > 1))
    return Section("What was adapted", (), tuple(tables))


def text_facts(runs: Sequence[Record]) -> Section | None:
    """Say what text was trained and measured on, and what of it was lost; of runs with equal text once.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section, to which the pictures of lengths belong; None where nothing is known of the text.
    """
    of_runs: list[tuple[Any, list[str]]] = []
    for run in runs:
        splits = splits_of(run)
        names = next((names for other, names in of_runs if other == splits), None)
        if names is not None:
            names.append(run["name"])
        elif splits:
            of_runs.append((splits, [run["name"]]))
    tables = []
    for splits, names in of_runs:
        columns = [_of_split(facts) for _, facts in splits]
        rows = side_by_side(list(OF_TEXT.values()), columns)
        title = "Text and rows" if len(of_runs) == 1 else f"Text and rows of {', '.join(names)}"
        tables.append(Table(title, ("", *(split for split, _ in splits)), rows))
        of = "" if len(of_runs) == 1 else f" of {', '.join(names)}"
        tables += [
            Table(f"Lengths of the texts{of}, {split}", ("tokens", "texts", "share"), lengths, folded=True)
            for split, facts in splits
            if (lengths := _lengths(facts))
        ]
    return Section("Text", (), tuple(tables), place="lengths") if tables else None


def memory_facts(runs: Sequence[Record]) -> Section | None:
    """Set the memory that was predicted beside the memory that was measured.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section; None where no run has recorded its memory.
    """
    columns = [_memory(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return Section("Memory", (), (_across("Bytes by kind", runs, names, columns),)) if names else None


def run_again(runs: Sequence[Record]) -> Section:
    """Give the command that runs each again.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section.
    """
    texts = (
        "What was given stands in the command; all else is at its default. Local files stand with their names alone: "
        "put the path before them. The run folder's arguments.yaml holds all arguments, and runs as well.",
    )
    return Section("Run it again", texts, codes=tuple((run["name"], run["command"]) for run in runs))


def environment_facts(runs: Sequence[Record]) -> Section | None:
    """Say on what the runs ran.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section; None where nothing was recorded.
    """
    columns = [_environment(run["environment"]) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return Section("Environment", (), (_across("Machine and versions", runs, names, columns),)) if names else None


def all_arguments(runs: Sequence[Record]) -> Section:
    """List the arguments, and where those come from that are no defaults.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section.
    """
    tables = []
    for run in runs:
        of = f" of {run['name']}" if len(runs) > 1 else ""
        rows = tuple(
            (name, argument_text(value), str(run["given"].get(name) or "default"))
            for name, value in run["arguments"].items()
        )
        tables.append(Table(f"All arguments{of}", ("argument", "value", "from"), rows, folded=True))
    return Section("Arguments", (), tuple(tables))


def _across(title: str, runs: Sequence[Record], names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> Table:
    """Make a table with a column for each run; of one run, without a header."""
    header = ("", *(run["name"] for run in runs)) if len(runs) > 1 else ()
    return Table(title, header, side_by_side(names, columns))


def _evaluations(run: Record) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    records = run["evaluations"]
    kept = [(key, name) for key, name in EVALUATED if any(key in record for record in records)]
    rows = ((cell(record["step"]), *(with_interval(record, key) for key, _ in kept)) for record in records)
    return ("step", *(name for _, name in kept)), tuple(rows)


def _logs(run: Record) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    every = max(1, -(-len(run["logs"]) // MOST_LOGS))
    records = run["logs"][::-1][::every][::-1]  # the last one is among them
    kept = [(key, name) for key, name in LOGGED if any(key in record for record in records)]
    rows = ((cell(record["step"]), *(_logged(record, key) for key, _ in kept)) for record in records)
    return ("step", *(name for _, name in kept)), tuple(rows)


def _logged(record: Record, key: str) -> str:
    value = figure(record, key)
    if value is None:
        return ""
    if key == "peak_memory_bytes":
        return bytes_text(int(value))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _adapted(run: Record) -> dict[str, str]:
    summary, base, adapter = run["summary"], run["base"], adapter_of(run)
    trained, total = figure(summary, "trainable_parameters"), figure(summary, "total_parameters")
    share = f" of {cell(total)} ({trained / total:.2%})" if trained is not None and total else ""
    quantised = table(summary, "quantisation")
    size = figure(summary, "saved_bytes")
    best = figure(summary, "best_checkpoint_step")
    return {
        "base": value_text(base.get("name")),
        "revision of the base": value_text(base.get("revision")),
        "architecture": value_text(base.get("architecture")),
        "base prepared with": value_text(base.get("recipe")),
        "base in bits": f"{quantised['bits']} ({quantised.get('kind')})" if quantised.get("bits") else "",
        "method": _method(run, adapter),
        **{name: value_text(adapter.get(name)) for name in ("rank", "alpha", "scaling")},
        "layers": _layers(adapter),
        "trained in full": value_text(adapter.get("trained_modules")),
        "new tokens": value_text(adapter.get("new_tokens") or None),
        "trained parameters": "" if trained is None else cell(trained) + share,
        "saved": "" if size is None else bytes_text(int(size)),
        "steps": "" if figure(summary, "steps") is None else cell(figure(summary, "steps")),
        "epochs": "" if figure(summary, "epochs") is None else cell(figure(summary, "epochs")),
        "kept from step": "" if best is None else cell(best),
        "tokens per second, median": median_speed(run),
        "time of training": seconds_text(figure(summary, "train_seconds")),
        "time in all": seconds_text(figure(summary, "seconds")),
    }


def _method(run: Record, adapter: Record) -> str:
    method = run["summary"].get("method")
    return "all parameters trained" if method == "full" else value_text(adapter.get("title") or method)


def _layers(adapter: Record) -> str:
    targets = table(adapter, "targets")
    kinds = ", ".join(f"{name} × {cell(count)}" for name, count in targets.items())
    return f"{cell(adapter['target_layers'])}: {kinds}" if targets else ""


def _of_split(facts: Record) -> dict[str, str]:
    given = {**facts, "median": table(facts, "text_lengths").get("median"), "source": source_name(facts)}
    given |= {fact: facts.get(fact) or None for fact in ONLY_SOME}
    given["lost"] = _lost(facts)
    given["fingerprint"] = str(facts.get("fingerprint") or "")[:12]
    for fact in ("unknown_share", "fill_rate"):
        share = figure(facts, fact)
        given[fact] = None if share is None else f"{share:.2%}"
    return {name: value_text(given.get(fact)) for fact, name in OF_TEXT.items()}


def _lengths(facts: Record) -> tuple[tuple[str, ...], ...]:
    classes = length_classes(facts)
    total = sum(count for _, _, count in classes)
    return tuple((class_text(low, high), cell(count), f"{count / total:.1%}") for low, high, count in classes)


def _lost(facts: Record) -> str:
    """Say how many tokens of the texts are in no row, and why."""
    texts, cut = figure(facts, "truncated_texts"), figure(facts, "truncated_tokens")
    dropped = figure(facts, "dropped_tokens")
    told = [f"{cell(cut)}, where {cell(texts)} texts are longer than a row"] if cut else []
    told += [f"{cell(dropped)}, where a batch of texts does not fill its last row"] if dropped else []
    return "; ".join(told) if told else "none" if cut == 0 or dropped == 0 else ""


def _memory(run: Record) -> dict[str, str]:
    memory, quantised = table(run["summary"], "memory"), table(table(run["summary"], "quantisation"), "memory")
    predicted, measured = figure(memory, "predicted_bytes"), figure(memory, "measured_bytes")
    peak = max((record["peak_memory_bytes"] for record in run["logs"] if "peak_memory_bytes" in record), default=None)
    told = {
        "device": value_text(memory.get("device")),
        "predicted before the run": _bytes(predicted),
        "measured, largest": _bytes(measured),
        "predicted / measured": f"{predicted / measured:.3f}" if predicted is not None and measured else "",
        "largest that was logged": _bytes(peak) if measured is None else "",
        **{f"predicted: {kind}": _bytes(number(size)) for kind, size in table(memory, "parts").items()},
        **{f"base in bits: {kind}": _bytes(number(size)) for kind, size in quantised.items()},
    }
    return {name: text for name, text in told.items() if text}


def _bytes(size: float | int | None) -> str:
    return "" if size is None else bytes_text(int(size))


def _environment(environment: Record) -> dict[str, str]:
    names = {"started": "started", "device": "device", "platform": "system", "cpu_count": "CPUs", "python": "python"}
    told = {name: value_text(environment.get(key)) for key, name in names.items()}
    told["started"] = date_text(environment.get("started"))
    versions = {str(name): value_text(version) for name, version in table(environment, "versions").items()}
    return {**told, **versions, "commit of peft-mlm": str(environment.get("commit") or "")[:12]}
