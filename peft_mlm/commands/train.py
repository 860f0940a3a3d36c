"""`peft-mlm train`: load, adapt, train, measure, save."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.config import Arguments, describe_help, read_arguments, write_arguments, write_sources
from peft_mlm.console import bytes_text, interval_text, is_first_process, print_table, with_error
from peft_mlm.errors import HubError, PeftMlmError
from peft_mlm.hub import Destination, destination_of, open_repository, plan_upload, upload
from peft_mlm.memory_watch import forget_peak, peak_bytes, resident_bytes
from peft_mlm.model_checks import check_before_loading, check_training
from peft_mlm.out_of_memory import memory_told
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

    from peft_mlm.adaptation import Adapted
    from peft_mlm.adapter import Plan
    from peft_mlm.collator import MaskingCollator
    from peft_mlm.corpus import Corpus
    from peft_mlm.model import Base
    from peft_mlm.trainer import MaskedLMTrainer

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Prepared:
    """What a run trains with; `held` is what the process took before the base was loaded, in bytes."""

    arguments: Arguments
    run: RunFolder
    base: Base
    model: PreTrainedModel
    plan: Plan | None
    corpus: Corpus
    trainer: MaskedLMTrainer
    held: int | None = None


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
            _tell([f"interrupted; go on with: peft-mlm train {run.arguments} --resume_from_checkpoint true"])
        raise
    if destination is not None and is_first_process():
        _push(run, destination, summary)
    return TrainResult(run.path, summary, prepared.model.eval(), prepared.base.tokenizer)


def prepare(arguments: Arguments, run: RunFolder, checkpoint: Path | None = None) -> Prepared:
    """Load text, tokenizer and model, wrap the model, make rows, build the trainer; write nothing.

    Args:
        arguments: All groups.
        run: Where the run will write.
        checkpoint: The checkpoint that it goes on from, or None.

    Returns:
        Everything that training needs.
    """
    asked: dict[str, bool] = {
        "checkpointing": bool(arguments.training.get("activation_checkpointing")),
        "mixed_precision": bool(arguments.training.get("bf16") or arguments.training.get("fp16")),
    }
    if arguments.model.config_overrides is None:
        check_before_loading(
            name_or_path=arguments.model.model_name_or_path or arguments.model.config_name,
            model_type=arguments.model.model_type,
            attention=arguments.model.attn_implementation,
            **asked,
        )

    from peft_mlm.text_files import find_files

    evaluates = arguments.training.get("do_eval") is not False
    find_files([*(arguments.data.train_file or ()), *((evaluates and arguments.data.validation_file) or ())])

    from transformers import set_seed

    from peft_mlm.adaptation import (
        adapt,
        adapter_to_go_on_with,
        check_names,
        with_adapter_tokenizer,
        with_base_of_adapter,
    )
    from peft_mlm.batching import LengthBatches, row_lengths
    from peft_mlm.corpus import build_collators, build_corpus
    from peft_mlm.data import load_text
    from peft_mlm.data_passes import DataPass
    from peft_mlm.model import load_base
    from peft_mlm.precision import settle_types
    from peft_mlm.rank_schedule import planned_steps
    from peft_mlm.trainer import MaskedLMTrainer  # noqa: F401 - its libraries are loaded before memory is measured
    from peft_mlm.training_arguments import build_training_arguments, computes_in_half

    arguments = settle_types(arguments)
    _tell(arguments.notices)
    training = build_training_arguments(arguments.training, run.checkpoints)
    splits = ("train", "validation") if evaluates else ("train",)
    adapter = adapter_to_go_on_with(arguments)
    arguments = with_base_of_adapter(arguments, adapter)
    check_names(arguments, adapter)
    with training.main_process_first(desc="reading text"):  # one process fills the caches, the others find them
        text = load_text(
            arguments.data, cache_dir=arguments.model.cache_dir, token=arguments.model.token, splits=splits
        )
        set_seed(training.seed)
        held = resident_bytes()
        base = load_base(with_adapter_tokenizer(arguments.model, adapter))
        check_training(base.model.config.model_type, **asked)
        corpus = build_corpus(text, arguments.data, base.model, base.tokenizer)
    half = computes_in_half(training)
    collators = build_collators(corpus, arguments.data, base.tokenizer, seed=training.seed, half_precision=half)
    rows = corpus.rows["train"]
    most = arguments.data.max_tokens_per_batch
    size = training.train_batch_size
    by_tokens = None if most is None else LengthBatches(row_lengths(rows), batch_size=size, max_tokens=most)
    adapted = adapt(
        base,
        arguments,
        adapter,
        data=DataPass(rows, collators[0], training.per_device_train_batch_size, training.seed, training.device),
        total_steps=planned_steps(len(rows), training, batches=None if by_tokens is None else len(by_tokens)),
        checkpoint=checkpoint,
    )
    _tell((*base.notices, *corpus.notices, *adapted.notices))
    trainer = _build_trainer(arguments, run, base, adapted, corpus, collators, training)
    return Prepared(arguments, run, base, adapted.model, adapted.plan, corpus, trainer, held)


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


def _tell(notices: Iterable[str]) -> None:
    if is_first_process():
        for notice in notices:
            logger.info(notice)


def _build_trainer(
    arguments: Arguments,
    run: RunFolder,
    base: Base,
    adapted: Adapted,
    corpus: Corpus,
    collators: tuple[MaskingCollator, MaskingCollator],
    training: Any,
) -> MaskedLMTrainer:
    from peft_mlm.model import published_name
    from peft_mlm.saving import saver
    from peft_mlm.trainer import MaskedLMTrainer

    data, peft = arguments.data, arguments.peft
    patience = data.early_stopping_patience
    return MaskedLMTrainer(
        model=adapted.model,
        args=training,
        train_dataset=corpus.rows["train"],
        eval_dataset=corpus.rows.get("validation"),
        processing_class=base.tokenizer,
        data_collator=collators[0],
        eval_collator=collators[1],
        save=saver(
            base_name=published_name(base.name_or_path),
            base_revision=base.revision,
            tokenizer=base.tokenizer,
            tokenizer_changed=base.tokenizer_changed or bool(base.new_token_ids),
            base_arguments=arguments.model,
            fingerprint=base.fingerprint,
            initial=adapted.initial,
        ),
        run=run,
        max_tokens=data.max_tokens_per_batch,
        eval_mask_draws=data.eval_mask_draws,
        early_stopping=None if patience is None else (patience, data.early_stopping_threshold),
        loraplus_lr_ratio=None if peft is None else peft.loraplus_lr_ratio,
        use_lorafa=peft is not None and peft.use_lorafa,
        initial=adapted.initial,
    )


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
    from peft_mlm.memory import describe_run_memory
    from peft_mlm.metrics import describe_change

    trainer, validation = prepared.trainer, prepared.corpus.rows.get("validation")
    before = after = None
    if validation is not None:
        before = trainer.live_table.base = trainer.measure_base(label="base model")
        _tell([f"base model: perplexity {before.perplexity:.3f}, masked accuracy {before.accuracy:.4f}"])
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
        "memory": describe_run_memory(trainer, prepared.arguments, measured),
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
