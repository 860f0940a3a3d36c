"""Arguments -> everything that a run trains with: rows, collators, an adapted model, a trainer; nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_mlm.config import Arguments
from peft_mlm.console import is_first_process
from peft_mlm.memory_watch import resident_bytes
from peft_mlm.model_checks import check_before_loading, check_training
from peft_mlm.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from peft_mlm.adaptation import Adapted
    from peft_mlm.adapter import Plan
    from peft_mlm.collator import MaskingCollator
    from peft_mlm.corpus import Corpus
    from peft_mlm.model import Base
    from peft_mlm.trainer import MaskedLMTrainer

logger = logging.getLogger(__name__)


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
    evaluates = arguments.training.get("do_eval") is not False
    _check_before_loading(arguments, asked, evaluates=evaluates)

    from transformers import set_seed

    from peft_mlm.adaptation import (
        adapter_to_go_on_with,
        check_names,
        with_adapter_tokenizer,
        with_base_of_adapter,
    )
    from peft_mlm.corpus import build_collators, build_corpus
    from peft_mlm.data import load_text
    from peft_mlm.model import load_base
    from peft_mlm.precision import settle_types
    from peft_mlm.trainer import MaskedLMTrainer  # noqa: F401 - its libraries are loaded before memory is measured
    from peft_mlm.training_arguments import build_training_arguments, computes_in_half

    arguments = settle_types(arguments)
    tell(arguments.notices)
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
    adapted = _adapt(base, arguments, adapter, checkpoint, corpus.rows["train"], collators[0], training)
    tell((*base.notices, *corpus.notices, *adapted.notices))
    trainer = _build_trainer(arguments, run, base, adapted, corpus, collators, training)
    return Prepared(arguments, run, base, adapted.model, adapted.plan, corpus, trainer, held)


def _adapt(
    base: Base,
    arguments: Arguments,
    adapter: Path | None,
    checkpoint: Path | None,
    rows: Dataset,
    masking: MaskingCollator,
    training: TrainingArguments,
) -> Adapted:
    """Wrap the model; some methods start from a pass over the rows, or move with the number of steps."""
    from peft_mlm.adaptation import adapt
    from peft_mlm.batching import LengthBatches, row_lengths
    from peft_mlm.data_passes import DataPass
    from peft_mlm.rank_schedule import planned_steps

    most, size = arguments.data.max_tokens_per_batch, training.train_batch_size
    by_tokens = None if most is None else LengthBatches(row_lengths(rows), batch_size=size, max_tokens=most)
    return adapt(
        base,
        arguments,
        adapter,
        data=DataPass(rows, masking, training.per_device_train_batch_size, training.seed, training.device),
        total_steps=planned_steps(len(rows), training, batches=None if by_tokens is None else len(by_tokens)),
        checkpoint=checkpoint,
    )


def _check_before_loading(arguments: Arguments, asked: dict[str, bool], *, evaluates: bool) -> None:
    """Refuse a model that cannot serve, and text that is not there, before anything heavy is imported."""
    if arguments.model.config_overrides is None:
        check_before_loading(
            name_or_path=arguments.model.model_name_or_path or arguments.model.config_name,
            model_type=arguments.model.model_type,
            attention=arguments.model.attn_implementation,
            **asked,
        )

    from peft_mlm.text_files import find_files

    find_files([*(arguments.data.train_file or ()), *((evaluates and arguments.data.validation_file) or ())])


def _build_trainer(
    arguments: Arguments,
    run: RunFolder,
    base: Base,
    adapted: Adapted,
    corpus: Corpus,
    collators: tuple[MaskingCollator, MaskingCollator],
    training: TrainingArguments,
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


def tell(notices: Iterable[str]) -> None:
    """Tell notices, once for all processes.

    Args:
        notices: Sentences.
    """
    if is_first_process():
        for notice in notices:
            logger.info(notice)
