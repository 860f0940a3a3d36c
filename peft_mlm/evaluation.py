"""A model that was loaded, and text -> the function that measures it, as a run measures its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from peft_mlm.config import Arguments
from peft_mlm.corpus import Corpus, build_collators, build_corpus
from peft_mlm.data import TextData
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import base_of, find_door
from peft_mlm.loading import Loaded
from peft_mlm.metrics import MaskedScores
from peft_mlm.quantization import is_quantised
from peft_mlm.trainer import scores_of
from peft_mlm.training_arguments import build_training_arguments, computes_in_half


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


def ready_to_measure(
    loaded: Loaded, text: TextData, arguments: Arguments, training: TrainingArguments, *, label: str
) -> tuple[Corpus, Callable[[], MaskedScores]]:
    """Make rows of a text, and move the model to where it is measured.

    Args:
        loaded: Model and tokenizer.
        text: With a validation split.
        arguments: How to make rows and masks.
        training: From `evaluation_arguments`.
        label: What the progress bar says.

    Returns:
        The rows with their facts, and a function that measures the model as it then is.

    Raises:
        DataError: The text gives no row.
    """
    corpus = build_corpus(text, arguments.data, loaded.base.model, loaded.tokenizer)
    half = computes_in_half(training)
    _, masking = build_collators(corpus, arguments.data, loaded.tokenizer, seed=training.seed, half_precision=half)
    model = loaded.model if is_quantised(loaded.model) else loaded.model.to(training.device)
    door = find_door(base_of(model))

    def measure() -> MaskedScores:
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
            )

    return corpus, measure
