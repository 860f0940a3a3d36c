"""`peft-mlm train`: load, adapt, train, measure, save."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.config import Arguments, describe_help, read_arguments, write_arguments, write_sources
from peft_mlm.console import bytes_text, interval_text, is_first_process, print_table, with_error
from peft_mlm.errors import HubError, PeftMlmError
from peft_mlm.hub import Destination, destination_of, open_repository, plan_upload, upload
from peft_mlm.memory_watch import forget_peak, peak_bytes
from peft_mlm.out_of_memory import memory_told
from peft_mlm.preparation import Prepared, prepare, tell
from peft_mlm.reporting import asked_reporters, check_reporters
from peft_mlm.run_folder import (
    RunFolder,
    check_output_dir,
    cut_metrics,
    describe_environment,
    find_checkpoint,
    folder_bytes,
    read_json,
    staged,
    write_json,
    write_text,
)
from peft_mlm.settled_arguments import with_token_lists, with_whole_paths
from peft_mlm.shipped import find_shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """What training gives back.

    Attributes:
        run_folder: Folder with everything the run left.
        metrics: The run's summary: `base` and `adapted` figures, parameters, bytes, seconds.
        model: The trained model, in evaluation mode; a PeftModel where an adapter was trained.
        tokenizer: Its tokenizer.
    """

    run_folder: Path
    metrics: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def train(config: Mapping[str, Any] | str | Path, *, flags: Sequence[str] = ()) -> TrainResult:
    """Train an adapter on a masked language model, or the whole model.

    Args:
        config: The arguments as a dict, or a JSON or YAML file.
        flags: With a file: words of a command line that override it, such as `["--max_steps", "10"]`.

    Returns:
        Run folder, figures, model and tokenizer.

    Raises:
        ArgumentsError: Arguments are wrong; all faults are named.
        DataError: The text is missing, empty or too short.
        ModelError: The base or its tokenizer cannot serve.
        AdapterError: The adapter's options do not fit the base.
        RunFolderError: `output_dir` is not empty, or there is no run to resume.
    """
    if isinstance(config, Mapping):
        return run_training(read_arguments(values=config))
    return run_training(read_arguments(config, flags))


def run_training(arguments: Arguments) -> TrainResult:
    """Run a training with resolved arguments.

    Args:
        arguments: All groups.

    Returns:
        As `train`.
    """
    with memory_told(arguments):
        return _run(with_token_lists(with_whole_paths(arguments)))


def _run(arguments: Arguments) -> TrainResult:
    started = time.perf_counter()
    check_reporters(asked_reporters(arguments.training))
    run = RunFolder(Path(arguments.training["output_dir"]).expanduser())
    resume = arguments.training.get("resume_from_checkpoint")
    resume = None if resume in (None, False, "false") else str(resume)
    destination = destination_of(arguments.training, arguments.model.token)
    if is_first_process():  # the others would see what it has begun to write
        check_output_dir(run.path, resume=resume is not None)
        if destination is not None:
            open_repository(destination)
    checkpoint = None if resume is None else find_checkpoint(run, resume)
    prepared = prepare(arguments, run, checkpoint)
    summary = _describe_run(prepared)
    _write_start(prepared, summary, checkpoint)
    try:
        summary |= _train_and_measure(prepared, summary, checkpoint)
        summary |= {"status": "finished", "seconds": round(time.perf_counter() - started, 1)}
        _save(prepared, summary)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if is_first_process():
            write_json(run.summary, {**summary, "status": status, "error": f"{type(error).__name__}: {error}"[:500]})
        if status == "interrupted":
            tell([f"interrupted; go on with: peft-mlm train {run.arguments} --resume_from_checkpoint true"])
        raise
    _add_plan(prepared, summary)
    if destination is not None and is_first_process():
        _push(run, destination, summary)
    return TrainResult(run.path, summary, prepared.model.eval(), prepared.base.tokenizer)


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    has_config = bool(words) and not words[0].startswith("-")
    arguments = read_arguments(words[0] if has_config else None, words[1:] if has_config else words)
    result = run_training(arguments)
    return {"run_folder": str(result.run_folder), **result.metrics}


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    if record["adapted"] is not None:
        _show_figures(record)
    share = record["trainable_parameters"] / record["total_parameters"]
    facts = [
        *_quantisation_rows(record["quantisation"]),
        ["trained parameters", f"{record['trainable_parameters']:,} of {record['total_parameters']:,} ({share:.2%})"],
        ["saved", f"{record['saved_to']} ({bytes_text(record['saved_bytes'])})"],
        ["steps, seconds", f"{record['steps']:,}, {record['seconds']:,}"],
    ]
    print_table(f"run {record['run_folder']}", None, facts, stream=sys.stdout)


def _show_figures(record: Mapping[str, Any]) -> None:
    rows = [
        [
            name,
            with_error(scores["loss"], scores["loss_standard_error"]),
            scores["perplexity"],
            with_error(scores["accuracy"], scores["accuracy_standard_error"]),
            scores["masked_tokens"],
        ]
        for name, scores in (("base", record["base"]), ("adapted", record["adapted"]))
    ]
    header = ["", "loss", "perplexity", "masked accuracy", "masked tokens"]
    print_table("held-out text", header, rows, stream=sys.stdout)
    told = [
        [f"change of {name}", interval_text(change["difference"], change["low"], change["high"], change["level"])]
        for name, change in record["change"].items()
    ]
    print_table("", None, told, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm train --help`."""
    usage = (
        "usage: peft-mlm train [CONFIG.yaml|CONFIG.json] [--argument value ...] [--json]\n\n"
        "Train an adapter (--use_lora, or --peft_method with any method of PEFT) or the whole model. Flags override\n"
        "the file.\n"
    )
    return usage + "\n" + describe_help(("model", "data", "peft", "training"))


def _quantisation_rows(quantisation: Mapping[str, Any] | None) -> list[list[str]]:
    if quantisation is None:
        return []
    memory = {part: bytes_text(size) for part, size in quantisation["memory"].items()}
    kind = f"{quantisation['kind']}{' with double quantisation' if quantisation['double_quant'] else ''}"
    computes = f", computing in {quantisation['compute_dtype']}" if quantisation["compute_dtype"] else ""
    return [
        ["base", f"{quantisation['layers']} layers in {quantisation['bits']} bits ({kind}){computes}"],
        ["memory of the base", f"{memory['total']} (float32 {memory['float32']}, bfloat16 {memory['bfloat16']})"],
        ["  of that", ", ".join(f"{part} {memory[part]}" for part in ("quantised", "embeddings", "head", "other"))],
    ]


def _write_start(prepared: Prepared, summary: dict[str, Any], checkpoint: Path | None) -> None:
    """Write what is known before the first step."""
    from peft_mlm.trainer import device_name

    run, trainer = prepared.run, prepared.trainer
    if not trainer.args.should_save:
        return
    run.path.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_arguments(prepared.arguments, run.arguments)
        write_sources(prepared.arguments, run.sources)
    else:
        cut_metrics(run.metrics, read_json(checkpoint / "trainer_state.json")["global_step"])
    started = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.environment, {**describe_environment(device_name(trainer.args.device)), "started": started})
    write_json(run.dataset, prepared.corpus.facts)
    write_json(run.summary, summary)


def _describe_run(prepared: Prepared) -> dict[str, Any]:
    from peft_mlm.adapter import count_parameters

    trainable, total = count_parameters(prepared.model)
    return {
        "status": "running",
        "method": "full" if prepared.arguments.peft is None else _peft_type(prepared.model),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "quantisation": prepared.base.quantisation,
        "base": None,
        "adapted": None,
        "change": None,
    }


def _peft_type(model: Any) -> str:
    """Name the method of an adapter as `peft_method` does."""
    return str(model.peft_config["default"].peft_type.value).lower()


def _train_and_measure(prepared: Prepared, summary: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    from peft_mlm.metrics import describe_change

    trainer, validation = prepared.trainer, prepared.corpus.rows.get("validation")
    before = after = None
    if validation is not None:
        before = trainer.live_table.base = trainer.measure_base(label="base model")
        tell([f"base model: perplexity {before.perplexity:.3f}, masked accuracy {before.accuracy:.4f}"])
        summary["base"] = before.describe()
        if trainer.args.should_save:  # a run that is killed has it
            write_json(prepared.run.summary, summary)
    known = forget_peak(trainer.args.device)
    done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    measured = peak_bytes(trainer.args.device, prepared.held) if known else None
    if before is not None:
        after = trainer.measure_trained(label="adapted model")
    return {
        "adapted": None if after is None else after.describe(),
        "change": None if before is None or after is None else describe_change(before, after),
        "steps": done.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 4),
        "memory": {"measured_bytes": measured},
        "train_seconds": round(done.metrics["train_runtime"], 1),
        "best_checkpoint_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
    }


def _save(prepared: Prepared, summary: dict[str, Any]) -> None:
    """Write adapter (or model), card and summary."""
    from peft_mlm.card import render_card
    from peft_mlm.checksums import write_checksums
    from peft_mlm.training_facts import training_facts, write_training_facts

    run, trainer = prepared.run, prepared.trainer
    folder = run.model if prepared.arguments.peft is None else run.adapter
    if trainer.args.should_save:
        with staged(folder) as temporary:
            trainer.save_into(trainer.accelerator.unwrap_model(trainer.model), temporary)
            write_text(temporary / "README.md", render_card(_card_of(prepared, summary)))
            data, tokenizer = prepared.arguments.data, prepared.base.tokenizer
            write_training_facts(training_facts(data, prepared.corpus.facts, tokenizer, summary), temporary)
            write_checksums(temporary)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        summary |= {"saved_to": str(folder), "saved_bytes": folder_bytes(folder)}
        summary |= {} if prepared.arguments.peft is None else {"adapter_bytes": weights}
        write_json(run.summary, summary)


def _add_plan(prepared: Prepared, summary: dict[str, Any]) -> None:
    """Set the memory that a plan gives beside what was measured; last, since all else is saved by now."""
    from peft_mlm.memory import describe_run_memory

    measured = summary["memory"]["measured_bytes"]
    summary["memory"] = describe_run_memory(prepared.trainer, prepared.arguments, measured)
    if prepared.trainer.args.should_save:
        write_json(prepared.run.summary, summary)


def _card_of(prepared: Prepared, summary: Mapping[str, Any]) -> dict[str, Any]:
    from peft_mlm.run_card import card_facts

    modules = prepared.plan.trained_modules if prepared.plan else ()
    return card_facts(
        prepared.arguments, prepared.base, prepared.model, prepared.corpus, summary, trained_modules=modules
    )


def _push(run: RunFolder, destination: Destination, summary: dict[str, Any]) -> None:
    """Upload what was trained; where that fails, the run is finished all the same."""
    try:
        done = upload(plan_upload(find_shipped(run.path)), destination)
    except PeftMlmError as error:
        later = f"The run is finished and saved; push it later by: peft-mlm push {run.path} {destination.repo_id}"
        later += f" --revision {destination.revision}" if destination.revision else ""
        later += " --private" if destination.private else ""
        raise HubError(f"{error} {later}") from error
    summary["pushed"] = {"repo_id": destination.repo_id, **done}
    write_json(run.summary, summary)
