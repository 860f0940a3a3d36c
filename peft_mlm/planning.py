"""A plan of a run: what it takes, whether that fits, and what to change in which order where it doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_mlm.config import Arguments
from peft_mlm.memory import (
    Outline,
    Prediction,
    batch_of,
    build_outline,
    evaluation_batch,
    predict,
    step_of,
    training_batch,
)
from peft_mlm.model_types import MODEL_TYPES, ModelType
from peft_mlm.out_of_memory import smaller_batch
from peft_mlm.run_size import describe_run_size
from peft_mlm.step_memory import Batch

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHORTEST = 32
# Attention code whose memory is counted apart; flash attention takes what sdpa's own kernels take.
ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Device:
    """What a run would go to.

    Attributes:
        kind: "cpu" or "cuda".
        name: For people.
        total: Its memory in bytes; None where it is not known.
        taken: Bytes of it that are taken before a model is loaded: CUDA's context, or the libraries of the process.
    """

    kind: str
    name: str
    total: int | None
    taken: int

    def holds(self, predicted: int) -> bool | None:
        """Tell whether a run of so many bytes fits; None where its memory is not known."""
        return None if self.total is None else predicted + self.taken <= self.total


class Planner:
    """Predicts the memory of a run and of changes to it; what was counted once is kept.

    Args:
        arguments: All groups, types settled.
        device: What the run goes to.
    """

    def __init__(self, arguments: Arguments, device: Device) -> None:
        self.arguments, self.device = arguments, device
        self._outlines: dict[str, Outline] = {}
        self._sizes: dict[str, dict[str, Any]] = {}
        self._predictions: dict[str, Prediction] = {}

    def outline(self, arguments: Arguments) -> Outline:
        """Give the outline of a run's model."""
        key = _model_key(arguments)
        if key not in self._outlines:
            self._outlines[key] = build_outline(arguments)
        return self._outlines[key]

    def size(self, arguments: Arguments) -> dict[str, Any]:
        """Give the size of a run."""
        outline = self.outline(arguments)
        key = repr((arguments.data, arguments.training))
        if key not in self._sizes:
            self._sizes[key] = describe_run_size(
                arguments, outline.tokenizer, outline.max_seq_length, apart=outline.apart
            )
        return self._sizes[key]

    def predict(self, arguments: Arguments) -> Prediction:
        """Predict a run as it stands."""
        outline, longest = self.outline(arguments), self.size(arguments)["longest_row"]
        batch, evaluated = training_batch(outline, arguments, longest), evaluation_batch(outline, arguments, longest)
        return self._predict(arguments, batch, evaluated)

    def of_batch(self, rows: int, *, checkpointing: bool) -> Prediction:
        """Predict the run's training with batches of another size."""
        outline = self.outline(self.arguments)
        tokens = training_batch(outline, self.arguments, self.size(self.arguments)["longest_row"]).tokens
        batch = batch_of(self.arguments, rows, tokens, apart=outline.apart)
        changed = with_training(self.arguments, activation_checkpointing=checkpointing)
        return self._predict(changed, batch, None)

    def _predict(self, arguments: Arguments, batch: Batch, evaluated: Batch | None) -> Prediction:
        on_gpu = self.device.kind == "cuda"
        key = repr((_model_key(arguments), batch, evaluated, step_of(arguments, on_gpu=on_gpu)))
        if key not in self._predictions:
            self._predictions[key] = predict(self.outline(arguments), arguments, batch, evaluated, on_gpu=on_gpu)
        return self._predictions[key]


def _model_key(arguments: Arguments) -> str:
    return repr((arguments.model, arguments.peft, arguments.data.max_seq_length, arguments.data.rows))


def with_training(arguments: Arguments, **values: Any) -> Arguments:
    """Change training arguments.

    Args:
        arguments: All groups.
        **values: By name.

    Returns:
        The changed arguments.
    """
    return replace(arguments, training={**arguments.training, **values})


def make_plan(arguments: Arguments, device: Device) -> dict[str, Any]:
    """Plan a run.

    Args:
        arguments: All groups, types settled.
        device: What it goes to.

    Returns:
        The record that `peft-mlm plan --json` prints.
    """
    planner = Planner(arguments, device)
    outline, size = planner.outline(arguments), planner.size(arguments)
    prediction = planner.predict(arguments)
    batch = training_batch(outline, arguments, size["longest_row"])
    fits = device.holds(prediction.total)
    return {
        "model": arguments.model.model_name_or_path or arguments.model.config_name or arguments.model.model_type,
        "device": {"kind": device.kind, "name": device.name, "total_bytes": device.total, "taken_bytes": device.taken},
        "trainable_parameters": outline.trainable,
        "total_parameters": outline.total,
        "weights": dict(outline.weights),
        "holds_in": "4 bits" if arguments.model.load_in_4bit else "8 bits" if arguments.model.load_in_8bit else None,
        "dtype": arguments.model.dtype,
        "computes_in": _computes_in(arguments),
        "batch": {
            "rows": batch.rows,
            "tokens": batch.tokens,
            "accumulation": arguments.training.get("gradient_accumulation_steps") or 1,
        },
        **{name: size[name] for name in ("texts", "rows", "steps", "epochs", "tokens", "about")},
        "predicted_bytes": prediction.total,
        "parts": dict(prediction.parts),
        "phase": prediction.phase,
        "fits": fits,
        "activations": _activations(planner),
        "batch_sizes": _batch_sizes(planner),
        "remedies": list(_remedies(planner)) if fits is False else [],
        "measured_bytes": None,
        "notices": [*outline.notices, *([size["why"]] if size["why"] else [])],
    }


def _computes_in(arguments: Arguments) -> str:
    given = arguments.training
    return "bfloat16" if given.get("bf16") else "float16" if given.get("fp16") else "float32"


def _type_of(outline: Outline) -> ModelType:
    return MODEL_TYPES.get(outline.model.config.model_type, ModelType())


def _activations(planner: Planner) -> list[dict[str, Any]]:
    """Count activations with and without checkpointing, for each attention code that the type has."""
    outline = planner.outline(planner.arguments)
    row, rows = _type_of(outline), []
    chosen = str(outline.model.config.get_text_config()._attn_implementation)
    for attention in dict.fromkeys((chosen, *(name for name in ATTENTION if name in row.attention))):
        changed = replace(planner.arguments, model=replace(planner.arguments.model, attn_implementation=attention))
        if attention == chosen:
            changed = planner.arguments
        for checkpointing in (False, True) if row.checkpointing else (False,):
            parts = planner.predict(with_training(changed, activation_checkpointing=checkpointing, do_eval=False)).parts
            rows.append(
                {
                    "attention": attention,
                    "chosen": attention == chosen,
                    "checkpointing": checkpointing,
                    "activations": parts["activations"],
                    "logits": parts["logits"],
                }
            )
    return rows


def _batch_sizes(planner: Planner) -> list[dict[str, Any]]:
    """Predict the training for some sizes of a batch, with and without checkpointing."""
    can, table = _type_of(planner.outline(planner.arguments)).checkpointing, []
    for rows in BATCH_SIZES:
        plain = planner.of_batch(rows, checkpointing=False).total
        less = planner.of_batch(rows, checkpointing=True).total if can else None
        table.append(
            {
                "rows": rows,
                "predicted_bytes": plain,
                "fits": planner.device.holds(plain),
                "with_checkpointing": less,
                "fits_with_checkpointing": None if less is None else planner.device.holds(less),
            }
        )
    return table


def _remedies(planner: Planner) -> Iterator[dict[str, Any]]:
    """Go through what takes less, each on top of those before, until the run fits; as a full memory is told."""
    arguments = planner.arguments
    for change in (_smaller_batches, _checkpointing, _adapter, _bits, _shorter):
        for flags, changed in change(planner, arguments):
            arguments = changed
            predicted = planner.predict(arguments).total
            fits = planner.device.holds(predicted)
            yield {"flags": flags, "predicted_bytes": predicted, "fits": fits}
            if fits:
                return


Change = Callable[[Planner, Arguments], Iterator[tuple[str, Arguments]]]


def _smaller_batches(planner: Planner, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    given, data = arguments.training, arguments.data
    accumulation = int(given.get("gradient_accumulation_steps") or 1)
    if data.max_tokens_per_batch is not None:
        tokens, least = data.max_tokens_per_batch, planner.outline(arguments).max_seq_length
        while tokens // 2 >= least:
            tokens, accumulation = tokens // 2, 2 * accumulation
            changed = replace(
                with_training(arguments, gradient_accumulation_steps=accumulation),
                data=replace(data, max_tokens_per_batch=tokens),
            )
            yield f"--max_tokens_per_batch {tokens} --gradient_accumulation_steps {accumulation}", changed
        return
    rows = int(given.get("per_device_train_batch_size") or 8)
    evaluated = int(given.get("per_device_eval_batch_size") or 8)
    while (smaller := smaller_batch(rows, accumulation)) is not None:
        rows, accumulation = smaller
        values = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        if evaluated > rows and planner.predict(with_training(arguments, **values)).phase == "evaluation":
            values["per_device_eval_batch_size"] = rows
        yield " ".join(f"--{name} {value}" for name, value in values.items()), with_training(arguments, **values)


def _checkpointing(planner: Planner, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    can = _type_of(planner.outline(arguments)).checkpointing
    if can and not arguments.training.get("activation_checkpointing"):
        yield "--activation_checkpointing", with_training(arguments, activation_checkpointing=True)


def _adapter(planner: Planner, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    if arguments.peft is None and arguments.model.model_name_or_path is not None:
        from peft_mlm.arguments import PEFTArguments

        yield "--use_lora", replace(arguments, peft=PEFTArguments(use_lora=True))


def _bits(planner: Planner, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    model = arguments.model
    if arguments.peft is not None and not model.load_in_4bit and not model.load_in_8bit:
        yield "--load_in_4bit", replace(arguments, model=replace(model, load_in_4bit=True))


def _shorter(planner: Planner, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    length = training_batch(planner.outline(arguments), arguments, planner.size(arguments)["longest_row"]).tokens
    while length // 2 >= SHORTEST:
        length //= 2
        yield f"--max_seq_length {length}", replace(arguments, data=replace(arguments.data, max_seq_length=length))
