"""Our defaults for training, and the rules that hold for values and between arguments."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from peft_mlm.argument_types import show

When = Literal["always", "adapter", "eval_by_steps", "early_stopping", "lengths_differ"]


class TrainingDefault(NamedTuple):
    """A value that is used where the user gave none, in place of transformers' default."""

    name: str
    value: Any
    when: When
    reason: str


TRAINING_DEFAULTS = (
    TrainingDefault("eval_strategy", "steps", "always", "a run shows whether it learns; transformers' is no"),
    TrainingDefault("eval_steps", 0.2, "eval_by_steps", "five evaluations, however long the run"),
    TrainingDefault("logging_steps", 0.02, "always", "fifty points on the loss curve, however long the run"),
    TrainingDefault("report_to", "none", "always", "nothing leaves the machine unless asked for"),
    TrainingDefault("train_sampling_strategy", "group_by_length", "lengths_differ", "little of a batch is padding"),
    TrainingDefault("learning_rate", 3e-4, "adapter", "few, fresh parameters take larger steps than a trained model"),
    TrainingDefault("load_best_model_at_end", True, "early_stopping", "one stops early to have the best, not the last"),
    TrainingDefault("metric_for_best_model", "eval_loss", "early_stopping", "early stopping needs a metric by name"),
)
# These take the value of another argument, so that checkpoints lie where evaluations are (load_best_model_at_end).
FOLLOWERS = {"save_strategy": "eval_strategy", "save_steps": "eval_steps"}
WHEN_TEXT: dict[When, str] = {
    "always": "default",
    "adapter": "default for an adapter",
    "eval_by_steps": "default",
    "early_stopping": "default for early stopping",
    "lengths_differ": "default for rows of different lengths",
}

# An argument that overrides others of a source before it: so a file that gives a whole adapter can be used with
# another adapter, or without one, by a flag.
_LORA_ALONE = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "loraplus_lr_ratio",
    "use_lorafa",
)
_OF_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant")
_SHAPE = (
    "peft_method",
    "peft_config",
    "lora_target_modules",
    "lora_exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    *_LORA_ALONE,
)
SETS_ASIDE: dict[str, tuple[str, ...]] = {
    "adapter_name_or_path": _SHAPE,
    "peft_method": ("use_lora", "peft_config", *_LORA_ALONE),
    "peft_method lora": ("peft_config",),
    "no use_lora": (*_SHAPE, "adapter_name_or_path", "base_dropout"),
    "dataset_name": ("train_file", "validation_file", "dataset_config_name", "dataset_revision"),
    "train_file": ("dataset_name", "dataset_config_name", "dataset_revision"),
    "load_in_4bit": ("load_in_8bit", "llm_int8_threshold"),
    "load_in_8bit": ("load_in_4bit", *_OF_4BIT),
    "no load_in_4bit": _OF_4BIT,
    "no load_in_8bit": ("llm_int8_threshold",),
}

# Set by the command, or by the launcher for each process: not part of what a run is.
NOT_RECORDED = frozenset(
    {"do_train", "do_eval", "do_predict", "local_rank", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
)


def default_training(
    given: Mapping[str, Any], *, adapter: bool, early_stopping: bool, lengths_differ: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Choose our defaults for training arguments that were not given.

    Args:
        given: Training arguments that were given, None where a file says null.
        adapter: Whether an adapter is trained.
        early_stopping: Whether a patience was given.
        lengths_differ: Whether rows are whole texts, or batches are measured in tokens.

    Returns:
        Values by name, and for each where it comes from.
    """
    told = {name: value for name, value in given.items() if value is not None}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if told.get("do_eval") is False and "eval_strategy" not in told:
        values["eval_strategy"], sources["eval_strategy"] = "no", "follows do_eval"
    strategy = told.get("eval_strategy", values.get("eval_strategy", "steps"))
    holds: dict[When, bool] = {
        "always": True,
        "adapter": adapter,
        "eval_by_steps": strategy == "steps",
        "early_stopping": early_stopping,
        "lengths_differ": lengths_differ,
    }
    for row in TRAINING_DEFAULTS:
        if holds[row.when] and row.name not in told and row.name not in values:
            values[row.name], sources[row.name] = row.value, WHEN_TEXT[row.when]
    if strategy != "no":
        saving = told.get("save_strategy", "steps" if "save_steps" in told else strategy)
        follows = {"save_strategy": saving}
        if saving == strategy == "steps":
            follows["save_steps"] = told.get("eval_steps", values.get("eval_steps"))
        for name, value in follows.items():
            if name not in told:
                values[name], sources[name] = value, f"follows {FOLLOWERS[name]}"
    return values, sources


class Range(NamedTuple):
    """What a number must be."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True

    def holds(self, value: float) -> bool:
        """Tell whether a number lies in the range."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        parts = []
        if self.low != -math.inf:
            parts.append(f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}")
        if self.high != math.inf:
            parts.append(f"less than {self.high:g}" if self.open_high else f"at most {self.high:g}")
        return " and ".join(parts)


_COUNT = Range(low=1)
_NOT_NEGATIVE = Range(low=0)
_POSITIVE = Range(low=0, open_low=True)
_SHARE = Range(low=0, high=1, open_high=False)
_BELOW_ONE = Range(low=0, high=1)
_SEED = Range(low=0, high=2**32)

RANGES: dict[str, Range] = {
    "validation_split_percentage": Range(low=0, high=100, open_low=True),
    "validation_split_seed": _SEED,
    "preprocessing_num_workers": _COUNT,
    "max_train_samples": _COUNT,
    "max_eval_samples": _COUNT,
    "max_tokens_per_batch": _COUNT,
    "max_seq_length": _COUNT,
    "mlm_probability": Range(low=0, high=1, open_low=True, open_high=False),
    "mask_replace_prob": _SHARE,
    "random_replace_prob": _SHARE,
    "eval_mask_seed": _SEED,
    "eval_mask_draws": _COUNT,
    "llm_int8_threshold": Range(low=0),
    "early_stopping_patience": _COUNT,
    "early_stopping_threshold": _NOT_NEGATIVE,
    "lora_r": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_dropout": _BELOW_ONE,
    "layers_to_transform": _NOT_NEGATIVE,
    "rank_pattern": _COUNT,
    "alpha_pattern": _POSITIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "num_train_epochs": _POSITIVE,
    "max_steps": Range(low=-1),
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": Range(low=0, open_high=False),
    "label_smoothing_factor": _BELOW_ONE,
    "neftune_noise_alpha": _POSITIVE,
    "eval_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": _NOT_NEGATIVE,
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "ddp_timeout": _COUNT,
}
# Below 1 a share of all steps, else a number of steps.
STEPS = ("warmup_steps", "eval_steps", "logging_steps", "save_steps")


def check_arguments(
    values: Mapping[str, Any], given: Collection[str], *, for_training: bool, planned: bool = False
) -> list[str]:
    """Check the ranges of values and the rules between arguments.

    Args:
        values: All values by name, defaults included.
        given: Names that the user gave a value.
        for_training: Whether a model is to be trained; else what only training needs may be missing.
        planned: Whether a training is only planned: text and output_dir may be missing.

    Returns:
        One sentence per fault.
    """
    faults = _check_ranges(values)
    faults += _check_model(values, given, for_training)
    faults += _check_new_tokens(values, given)
    faults += _check_data(
        values, {*given, "train_file"} if planned and "dataset_name" not in given else given, for_training
    )
    faults += _check_not_supported(values)
    faults += _check_evaluation(values)
    if for_training:
        faults += _check_training(values, {*given, "output_dir"} if planned else given)
    return faults


def _check_ranges(values: Mapping[str, Any]) -> list[str]:
    faults = []
    for name, allowed in RANGES.items():
        value = values.get(name)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in numbers:
            if number is not None and not allowed.holds(number):
                which = "" if number is value else f" (in {show(value)})"
                finite = " and finite" if abs(number) == math.inf else ""
                faults.append(f"{name} is {show(number)}{which}: it must be {allowed}{finite}.")
    for name in STEPS:
        steps: float = values.get(name) or 0
        if 1 < steps < math.inf and not float(steps).is_integer():
            faults.append(f"{name} is {steps:g}: it must be a whole number, or below 1 as a share of all steps.")
    total = values["mask_replace_prob"] + values["random_replace_prob"]
    if total > 1:
        faults.append(
            f"mask_replace_prob and random_replace_prob are {values['mask_replace_prob']:g} and "
            f"{values['random_replace_prob']:g}: together they must be at most 1."
        )
    for name, value in values.items():
        if value == [] and name in ("lora_target_modules", "lora_exclude_modules", "layers_to_transform"):
            faults.append(f"{name} is an empty list: name at least one, or leave it out.")
    return faults


def _check_model(values: Mapping[str, Any], given: Collection[str], for_training: bool) -> list[str]:
    faults = []
    scratch = [name for name in ("model_type", "config_name") if name in given]
    if "config_overrides" in given:
        barred = [name for name in ("model_name_or_path", "config_name") if name in given]
        if barred:
            faults.append(
                f"config_overrides is given together with {' and '.join(barred)}: it changes the config of a new model "
                "made by model_type. Leave one of them out."
            )
    if "config_name" in given and "model_name_or_path" in given:
        faults.append(
            "config_name is given together with model_name_or_path, which brings its own config: leave one of them out "
            "(without model_name_or_path the model is trained from scratch)."
        )
    if "model_name_or_path" in given or not for_training:
        return faults
    if not scratch:
        faults.append(
            "No model is given: name a base model by model_name_or_path, or train from scratch by model_type or "
            "config_name."
        )
    elif "tokenizer_name" not in given:
        faults.append(f"{scratch[0]} trains from scratch and brings no tokenizer: name one by tokenizer_name.")
    adapters = [name for name in ("use_lora", "peft_method", "adapter_name_or_path") if values.get(name)]
    if scratch and adapters:
        lora = adapters[0]
        faults.append(
            f"{lora} is given, but {scratch[0]} makes a model of random weights, which an adapter cannot learn from: "
            f"leave out {lora} to train in full, or name a base model by model_name_or_path."
        )
    return faults


def _check_new_tokens(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    faults = []
    sources = ("add_tokens", "add_special_tokens", "tokenizer_name", "adapter_name_or_path")
    if values["new_token_init"] != "mean" and not set(sources) & set(given):
        faults.append(
            f"new_token_init is {values['new_token_init']}, but no token is new: name tokens by add_tokens or "
            "add_special_tokens, or leave it out."
        )
    if values["add_tokens_inside_words"] and "add_tokens" not in given:
        faults.append("add_tokens_inside_words is given without add_tokens: name the tokens too, or leave it out.")
    return faults


def _check_data(values: Mapping[str, Any], given: Collection[str], for_training: bool) -> list[str]:
    faults = []
    if "dataset_name" in given and "train_file" in given:
        faults.append("dataset_name and train_file are both given: the text comes from one of them. Leave one out.")
    if for_training and not {"dataset_name", "train_file"} & set(given):
        faults.append("No text to train on is given: name files by train_file, or a data set by dataset_name.")
    if not for_training and not {"dataset_name", "train_file", "validation_file"} & set(given):
        faults.append(
            "No text to evaluate on is given: name files by validation_file or train_file, or a data set by "
            "dataset_name."
        )
    for name in ("dataset_config_name", "dataset_revision"):
        if name in given and "dataset_name" not in given:
            faults.append(f"{name} is given without dataset_name: name the data set too, or leave it out.")
    if values["line_by_line"] and values["rows"] != "line":
        faults.append(f"line_by_line is the same as rows line, but rows is {values['rows']}: leave one of the two out.")
    if values.get("max_tokens_per_batch") and values.get("train_sampling_strategy") != "group_by_length":
        faults.append(
            f"max_tokens_per_batch puts rows of like length together, but train_sampling_strategy is "
            f"{values['train_sampling_strategy']}: leave one of the two out."
        )
    if values["streaming"]:
        faults.append(
            "streaming is not supported: the text is memory-mapped from disk, so that it need not fit in memory. Leave "
            "it out, or download the data set first."
        )
    return faults


def _check_not_supported(values: Mapping[str, Any]) -> list[str]:
    faults = []
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        faults.append("push_to_hub needs a repository: give hub_model_id as OWNER/NAME.")
    if values.get("do_predict"):
        faults.append("do_predict is not supported: leave it out, and use `peft-mlm evaluate` or `peft-mlm fill-mask`.")
    for first, second in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if values.get(first) and values.get(second):
            faults.append(f"{first} and {second} are both true: choose one.")
    if values.get("dataloader_prefetch_factor") is not None and values.get("dataloader_num_workers") == 0:
        faults.append("dataloader_prefetch_factor needs dataloader_num_workers of 1 or more.")
    return faults


def _check_evaluation(values: Mapping[str, Any]) -> list[str]:
    """Check what needs evaluations while training."""
    if values["eval_strategy"] == "no":
        needy = [name for name in ("load_best_model_at_end", "early_stopping_patience") if values.get(name)]
        if values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
            needy.append(f"lr_scheduler_type {values['lr_scheduler_type']}")
        return [f"{name} needs evaluations: give eval_strategy steps or epoch (it is no)." for name in needy]
    if values.get("do_eval") is False:
        return [f"do_eval is false, but eval_strategy is {values['eval_strategy']}: leave one of the two out."]
    return _check_best(values)


def _check_best(values: Mapping[str, Any]) -> list[str]:
    """Check that there is a checkpoint wherever the best evaluation may fall."""
    by, saving = values["eval_strategy"], values["save_strategy"]
    if not values.get("load_best_model_at_end") or saving == "best":
        return []
    remedy = "leave out save_strategy and save_steps, and they follow eval_strategy and eval_steps."
    if saving != by:
        return [
            f"load_best_model_at_end needs save_strategy and eval_strategy alike, but they are {saving} and {by}: "
            + remedy
        ]
    steps, every = values.get("save_steps"), values.get("eval_steps")
    if by != "steps" or not steps or not every or not (math.isfinite(steps) and math.isfinite(every)):
        return []
    times = steps / every
    if (steps < 1) != (every < 1) or abs(times - round(times)) > 1e-6:
        return [
            f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, but they are {steps:g} and "
            f"{every:g}: {remedy}"
        ]
    return []


def _check_training(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    faults = []
    if "output_dir" not in given:
        faults.append("output_dir is missing: give the folder that the run is written to, such as runs/first.")
    if values.get("do_train") is False:
        faults.append("do_train is false, but train trains: leave it out, or use `peft-mlm evaluate`.")
    return faults
