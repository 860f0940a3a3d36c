"""The records of runs -> what a report says first: what was done, what it gave, and in what the runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_mlm.console import bytes_text, cell
from peft_mlm.report_content import (
    Record,
    Section,
    Table,
    Tile,
    adapter_of,
    argument_text,
    date_text,
    interval,
    median_speed,
    power,
    score_text,
    seconds_text,
    signed,
    source_name,
    value_text,
    with_interval,
)
from peft_mlm.run_record import NOT_REPEATED, figure, table

FIGURES = (("loss", "Loss, nats per masked token"), ("perplexity", "Perplexity"), ("accuracy", "Masked accuracy"),
           ("top5_accuracy", "Masked token among the first 5"))  # fmt: skip
# Figures of two runs can be compared where these are the same.
OF_MASKS = (
    *("eval_mask_seed", "eval_mask_draws", "mlm_probability", "mask_replace_prob", "random_replace_prob"),
    *("rows", "max_eval_samples"),
)
INTERVALS = "In brackets: 95 % intervals, 1.96 standard errors to either side"
OF_CHANGE = "; those of a change are of the paired differences"


def lead(runs: Sequence[Record]) -> tuple[str, ...]:
    """Say of each run in a sentence what was trained on what, and how it ended.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        A sentence for each; with the run's name, where there are several.
    """
    return tuple(f"{run['name']}: {_sentence(run)}" if len(runs) > 1 else _sentence(run) for run in runs)


def tiles(run: Record) -> tuple[Tile, ...]:
    """Pick the figures of one run that are seen first.

    Args:
        run: From `run_record.read_run`.

    Returns:
        Perplexity, accuracy, change of the loss, size, time; what the run does not have is left out.
    """
    return tuple(tile for tile in (*_figure_tiles(run), _size_tile(run), _time_tile(run)) if tile is not None)


def results(runs: Sequence[Record]) -> Section | None:
    """Set base and adapted model side by side, or several runs.

    Args:
        runs: From `run_record.read_runs`.

    Returns:
        The section; None where a run has no figures yet, and nothing to say.
    """
    one = len(runs) == 1
    shown = _figures_of_one(runs[0]) if one else _figures_of_several(runs)
    texts = [*(_verdict(runs[0]) if one else _comparable(runs))]
    if shown is not None and any(" to " in text for row in shown.rows for text in row[1:]):
        paired = any(figure(run["summary"], "change", "loss", "low") is not None for run in runs)
        texts.append(f"{INTERVALS}{OF_CHANGE if paired else ''}.")
    for run in runs:
        error = run["summary"].get("error")
        said = [*([f"ended with: {error}"] if isinstance(error, str) else []), *run["notices"]]
        texts += [text if one else f"{run['name']}: {text}" for text in said]
    if shown is None and not texts:
        return None
    return Section("Before and after" if one else "Side by side", tuple(texts), () if shown is None else (shown,))


def differences(runs: Sequence[Record]) -> Section:
    """List the arguments that are not the same in all runs.

    Args:
        runs: From `run_record.read_runs`, more than one.

    Returns:
        The section.
    """
    names = dict.fromkeys(name for run in runs for name in run["arguments"] if name not in NOT_REPEATED)
    rows = [(name, *(argument_text(run["arguments"].get(name)) for run in runs)) for name in names]
    # An option of an adapter is not set where the whole model is trained: no news, unless someone has set it.
    given = {name for run in runs for name in run["given"]}
    differing = tuple(
        tuple(text or "not set" for text in row)
        for row in rows
        if len({*row[1:]} - {""}) > 1 or (len({*row[1:]}) > 1 and row[0] in given)
    )
    title = "What the runs differ in"
    if not differing:
        return Section(title, ("All arguments are the same in all runs.",))
    shown = Table("Arguments that differ", ("argument", *(run["name"] for run in runs)), differing)
    return Section(title, ("All other arguments are the same.",), (shown,))


def _sentence(run: Record) -> str:
    base = run["base"].get("name") or run["arguments"].get("model_name_or_path")
    parts = [f"{_method(run)}, {f'on {base}' if base else 'from scratch'}"]
    source = source_name(table(run["data"], "train"))
    parts += [f"text: {source}"] if source else []
    started = date_text(run["environment"].get("started"))
    return "; ".join([*parts, _status(run), *([f"started {started}"] if started else [])]) + "."


def _method(run: Record) -> str:
    adapter, method = adapter_of(run), run["summary"].get("method")
    if not adapter:
        return "All parameters trained" if method == "full" else f"{method} adapter"
    numbers = [f"{name} {value_text(adapter[name])}" for name in ("rank", "alpha") if adapter.get(name)]
    return ", ".join([str(adapter["title"] or adapter["method"]), *numbers])


def _status(run: Record) -> str:
    summary = run["summary"]
    if summary.get("status") == "finished":
        return f"finished after {cell(figure(summary, 'steps'))} steps"
    last = max((record["step"] for record in (*run["logs"], *run["evaluations"])), default=None)
    reached = "it has logged nothing yet" if last is None else f"its last record is of step {cell(last)}"
    if summary.get("status") == "running":
        return f"not finished (it runs still, or was stopped before it could say so): {reached}"
    return f"not finished ({summary.get('status')}): {reached}"


def _after(run: Record) -> tuple[str, Record]:
    """Give the figures of the trained model, or else of the last evaluation, and their name."""
    adapted = table(run["summary"], "adapted")
    if adapted or not run["evaluations"]:
        return "adapted", adapted
    return f"step {cell(run['evaluations'][-1]['step'])}", run["evaluations"][-1]


def _figure_tiles(run: Record) -> list[Tile]:
    base, (name, after) = table(run["summary"], "base"), _after(run)
    shown = []
    for label, key in (("Perplexity", "perplexity"), ("Masked accuracy", "accuracy")):
        value, before, around = figure(after, key), figure(base, key), interval(after, key)
        if value is not None:
            remarks = [*([f"at {name}"] if name != "adapted" else []), *([f"95 % interval {around}"] if around else [])]
            text = score_text(key, value) if before is None else f"{score_text(key, before)} → {score_text(key, value)}"
            shown.append(Tile(label, text, "; ".join(remarks) or "held-out text"))
    change = table(table(run["summary"], "change"), "loss")
    difference = figure(change, "difference")
    if difference is not None:
        around = _change_interval(change)
        remark = "nats per masked token" + (f"; {_level(change)} interval {around}" if around else "")
        shown.append(Tile("Change of the loss", signed(difference), remark))
    return shown


def _size_tile(run: Record) -> Tile | None:
    summary = run["summary"]
    trained, total = figure(summary, "trainable_parameters"), figure(summary, "total_parameters")
    told = "" if trained is None else f"{cell(trained)} trained parameters"
    told += f", {trained / total:.2%} of all" if trained is not None and total else ""
    size = figure(summary, "adapter_bytes")
    if size is not None:
        return Tile("Adapter", bytes_text(int(size)), told)
    size = figure(summary, "saved_bytes")
    if size is not None:
        return Tile("Model", bytes_text(int(size)), told)
    return None if trained is None else Tile("Trained parameters", cell(trained), told.partition(", ")[2])


def _time_tile(run: Record) -> Tile | None:
    seconds, steps = figure(run["summary"], "seconds"), figure(run["summary"], "steps")
    if seconds is None:
        return None
    device = run["environment"].get("device")
    parts = [*([f"{cell(steps)} steps"] if steps is not None else []), *([f"on {device}"] if device else [])]
    return Tile("Time", seconds_text(seconds), " ".join(parts))


def _figures_of_one(run: Record) -> Table | None:
    base, (name, after), change = table(run["summary"], "base"), _after(run), table(run["summary"], "change")
    columns = [
        {label: with_interval(base, key) for key, label in FIGURES},
        {label: with_interval(after, key) for key, label in FIGURES},
        {label: _change(base, after, change, key) for key, label in FIGURES},
    ]
    shown = [place for place, column in enumerate(columns) if any(column.values())]
    if not shown:
        return None
    rows = tuple(
        (label, *(columns[place][label] for place in shown))
        for _, label in FIGURES
        if any(columns[place][label] for place in shown)
    )
    masked = figure(after, "masked_tokens") or figure(base, "masked_tokens")
    over = f" over {cell(masked)} masked tokens, the same ones in each column" if masked else ""
    header = ("", *(("base", name, "change")[place] for place in shown))
    return Table(f"Held-out text{over}", header, rows)


def _change(base: Record, after: Record, change: Record, key: str) -> str:
    """Write by how much a figure changed: paired over the masked tokens where that was measured, else plainly."""
    paired = table(change, "loss" if key == "perplexity" else key)
    difference = figure(paired, "difference")
    if difference is None:
        before, now = figure(base, key), figure(after, key)
        if before is None or now is None or key == "perplexity":
            return "" if before is None or now is None or not before else f"× {cell(now / before)}"
        return signed(now - before)
    around = _change_interval(paired, ratio=key == "perplexity")
    told = f"× {cell(power(difference))}" if key == "perplexity" else signed(difference)
    return told + (f" ({around})" if around else "")


def _change_interval(change: Record, *, ratio: bool = False) -> str:
    low, high = figure(change, "low"), figure(change, "high")
    if low is None or high is None:
        return ""
    if ratio:
        return f"{cell(power(low))} to {cell(power(high))}"
    return f"{signed(low)} to {signed(high)}"


def _level(change: Record) -> str:
    level = figure(change, "level")
    return f"{100 * (0.95 if level is None else level):.3g} %"


def _verdict(run: Record) -> list[str]:
    """Say what the interval of the change allows to be said."""
    change = table(table(run["summary"], "change"), "loss")
    low, high = figure(change, "low"), figure(change, "high")
    if low is None or high is None:
        return []
    told = f"The {_level(change)} interval of the change of the loss, paired over the same masked tokens,"
    if low <= 0 <= high:
        return [f"{told} holds 0: that the model got better or worse is not shown."]
    side, became = ("below", "better") if high < 0 else ("above", "worse")
    return [f"{told} lies {side} 0: on this text the model got {became}."]


def _figures_of_several(runs: Sequence[Record]) -> Table:
    bases = [table(run["summary"], "base") for run in runs]
    columns: list[tuple[str, list[str]]] = [
        ("perplexity", [_after_figure(run, "perplexity") for run in runs]),
        ("masked accuracy", [_after_figure(run, "accuracy") for run in runs]),
        ("change of the loss", [_loss_change(run) for run in runs]),
        ("trained parameters", [value_text(figure(run["summary"], "trainable_parameters")) for run in runs]),
        ("saved", [_saved(run) for run in runs]),
        ("steps", [value_text(figure(run["summary"], "steps")) for run in runs]),
        ("tokens/s", [median_speed(run) for run in runs]),
        ("time", [seconds_text(figure(run["summary"], "seconds")) for run in runs]),
    ]
    known = [base for base in bases if figure(base, "loss") is not None]
    rows: list[tuple[str, ...]] = []
    if known and all(base == known[0] for base in known):  # one base of all, measured on the same tokens
        rows.append(("base", with_interval(known[0], "perplexity"), with_interval(known[0], "accuracy")))
    else:
        for place, key in enumerate(("perplexity", "accuracy")):
            name = ("perplexity", "masked accuracy")[place]
            columns.insert(2 * place, (f"{name} of the base", [with_interval(base, key) for base in bases]))
    columns = [(name, texts) for name, texts in columns if any(texts)]
    rows = [(*row, *[""] * (len(columns) + 1 - len(row))) for row in rows]
    rows += [(run["name"], *(texts[place] for _, texts in columns)) for place, run in enumerate(runs)]
    return Table("Figures of the runs", ("run", *(name for name, _ in columns)), tuple(rows))


def _after_figure(run: Record, key: str) -> str:
    name, after = _after(run)
    told = with_interval(after, key)
    return f"{told} at {name}" if told and name != "adapted" else told


def _loss_change(run: Record) -> str:
    base, (_, after) = table(run["summary"], "base"), _after(run)
    return _change(base, after, table(run["summary"], "change"), "loss")


def _saved(run: Record) -> str:
    size = figure(run["summary"], "adapter_bytes") or figure(run["summary"], "saved_bytes")
    return "" if size is None else bytes_text(int(size))


def _comparable(runs: Sequence[Record]) -> list[str]:
    """Say whether the figures of the runs are of the same masked tokens, and which is the lowest loss."""
    measured = [run for run in runs if _after(run)[1]]
    if len(measured) < 2:
        return []
    keys = [_of_evaluation(run) for run in measured]
    if any(key != keys[0] for key in keys):
        return ["The runs were measured on different held-out texts, rows or masks: their figures cannot be compared "
                "with each other."]  # fmt: skip
    losses = [(figure(table(run["summary"], "adapted"), "loss"), run["name"]) for run in runs]
    finished = [(loss, name) for loss, name in losses if loss is not None]
    told = ["All runs were measured on the same held-out text with the same masks."]
    if len(finished) > 1:
        loss, name = min(finished)
        told.append(f"Lowest loss of the finished runs: {name} ({score_text('loss', loss)} nats per masked token).")
    return told


def _of_evaluation(run: Record) -> list[Any]:
    facts: Mapping[str, Any] = table(run["data"], "validation")
    names = ("fingerprint", "max_seq_length", "rows", "tokens", "rows_used")
    return [*(facts.get(name) for name in names), *(run["arguments"].get(name) for name in OF_MASKS)]
