"""A model that was loaded, and text -> the function that measures it, as a run measures its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from transformers import TrainingArguments

from peft_mlm.argument_fields import argument_fields
from peft_mlm.arguments import ModelArguments
from peft_mlm.config import Arguments
from peft_mlm.corpus import Corpus, build_collators, build_corpus
from peft_mlm.data import TextData
from peft_mlm.errors import ArgumentsError
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import base_of, find_door
from peft_mlm.loading import Loaded
from peft_mlm.metrics import MaskedScores, MaskedTokens
from peft_mlm.quantization import is_quantised
from peft_mlm.quantization_rules import QUANTISATION
from peft_mlm.trainer import scores_of
from peft_mlm.training_arguments import build_training_arguments, computes_in_half

# Flags of the model group that say how to load, not what.
HOW_TO_LOAD = ("model_revision", "token", "cache_dir", "trust_remote_code", "dtype", *QUANTISATION)


class Measure(Protocol):
    """Measures a model as it is."""

    def __call__(self, keep: Callable[[MaskedTokens], None] | None = None) -> MaskedScores:
        """Measure it; `keep` gets the masked tokens of each batch."""


def evaluation_arguments(arguments: Arguments) -> TrainingArguments:
    """Build transformers' arguments of an evaluation: device, precision, batch size, workers.

    Args:
        arguments: All groups.

    Returns:
        The arguments; nothing is written into their `output_dir`.

    Raises:
        ArgumentsError: transformers refuses a value or a combination.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        return build_training_arguments({**arguments.training, "resume_from_checkpoint": None}, Path(nowhere))


def how_to_load(base: ModelArguments, arguments: Arguments, *, command: str) -> ModelArguments:
    """Take over what flags say about loading; refuse flags that would have no effect.

    Args:
        base: How to load a base or a model.
        arguments: All groups.
        command: Who asks, for the message.

    Returns:
        The same base, loaded as the flags say.

    Raises:
        ArgumentsError: A flag names another model or an adapter.
    """
    flags = [name for name, source in arguments.sources.items() if source == "flag"]
    idle = [name for name in flags if argument_fields()[name].group in ("model", "peft") and name not in HOW_TO_LOAD]
    if idle:
        raise ArgumentsError(
            f"--{', --'.join(idle)}: {command} takes models and adapters by its first words, and --base."
        )
    given = {name: getattr(arguments.model, name) for name in HOW_TO_LOAD if name in flags}
    return replace(base, **{"dtype": arguments.model.dtype, **given})


def ready_to_measure(
    loaded: Loaded, text: TextData, arguments: Arguments, training: TrainingArguments, *, label: str
) -> tuple[Corpus, Measure]:
    """Make rows of a text, and move the model to where it is measured.

    Args:
        loaded: Model and tokenizer.
        text: With a validation split.
        arguments: How to make rows and masks.
        training: From `evaluation_arguments`.
        label: What the progress bar says.

    Returns:
        The rows with their facts, and a function that measures the model as it then is; where it is given a function,
        that gets the masked tokens of each batch.

    Raises:
        DataError: The text gives no row.
    """
    corpus = build_corpus(text, arguments.data, loaded.base.model, loaded.tokenizer)
    half = computes_in_half(training)
    _, masking = build_collators(corpus, arguments.data, loaded.tokenizer, seed=training.seed, half_precision=half)
    model = loaded.model if is_quantised(loaded.model) else loaded.model.to(training.device)
    door = find_door(base_of(model))

    def measure(keep: Callable[[MaskedTokens], None] | None = None) -> MaskedScores:
        # In 16 bits figures depend on how rows are padded and in which order a layer sums: both as in training.
        with fused_lora(model):
            return scores_of(
                model,
                corpus.rows["validation"],
                masking,
                training,
                label=label,
                door=door,
                draws=arguments.data.eval_mask_draws,
                keep=keep,
            )

    return corpus, measure
