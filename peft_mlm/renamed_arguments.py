"""Arguments of older transformers, of run_mlm and of neighbouring scripts that people still paste.

One row per name. It is renamed, translated, dropped (each with a notice) or refused with a sentence that says what to
do instead. To support another name is to add one row here and one test row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """The same argument has another name.

    Attributes:
        name: The name it has here; the value is read as that argument's.
    """

    name: str


@dataclass(frozen=True)
class Translated:
    """Other arguments say the same.

    Attributes:
        type: Annotation by which the old value is read.
        function: Takes the old value; returns the arguments that stand for it (none: it changes nothing here), or a
            sentence why it is refused.
        notice: What to tell when it changes nothing.
    """

    type: str
    function: Callable[[Any], Mapping[str, Any] | str]
    notice: str = "it says what happens anyway"


@dataclass(frozen=True)
class Dropped:
    """It changes nothing here, whatever its value.

    Attributes:
        why: The reason; to be read after "is left out: ".
    """

    why: str


@dataclass(frozen=True)
class Refused:
    """It cannot be used.

    Attributes:
        why: What to do instead; a whole sentence.
    """

    why: str


OldArgument = Renamed | Translated | Dropped | Refused

_PUSH = "It is a part of hub_model_id now: give that as OWNER/NAME."
_WHOLE_WORDS = "Whole-word masking is not in this version: leave it out."
_PRECISION = "Mixed precision is PyTorch's own: leave it out and give bf16 or fp16."
_NO_TPU = "Training on TPUs is not supported: leave it out."
_SHARDED = "It is a part of fsdp_config: give fsdp_config as a mapping that holds it."
_ACCELERATOR = "It is a part of accelerator_config: give accelerator_config as a mapping that holds it."


def _on(**arguments: Any) -> Callable[[bool], Mapping[str, Any]]:
    """Translate a switch: the arguments when it is on, nothing when it is off."""
    return lambda on: arguments if on else {}


def _refuse_on(sentence: str) -> Callable[[bool], Mapping[str, Any] | str]:
    return lambda on: sentence if on else {}


def _warmup(ratio: float) -> Mapping[str, Any] | str:
    if 0 <= ratio < 1:
        return {"warmup_steps": ratio}
    return f"It is {ratio:g} and must be at least 0 and below 1; for a number of steps give warmup_steps."


def _dtype(name: str) -> Mapping[str, Any]:
    return {"dtype": name.removeprefix("torch.")}


def _token(value: bool | str) -> Mapping[str, Any]:
    return {} if isinstance(value, bool) else {"token": value}


OLD_ARGUMENTS: dict[str, OldArgument] = {
    # transformers.TrainingArguments: renamed
    "evaluation_strategy": Renamed("eval_strategy"),
    "evaluate_during_training": Translated("bool", lambda on: {"eval_strategy": "steps" if on else "no"}),
    "push_to_hub_token": Renamed("hub_token"),
    "gradient_checkpointing": Renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": Renamed("activation_checkpointing_kwargs"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "torchdynamo": Renamed("torch_compile_backend"),
    "xpu_backend": Renamed("ddp_backend"),
    "warmup_ratio": Translated("float", _warmup),
    "group_by_length": Translated("bool", _on(train_sampling_strategy="group_by_length")),
    "no_cuda": Translated("bool", _on(use_cpu=True)),
    "adafactor": Translated("bool", _on(optim="adafactor")),
    "include_inputs_for_metrics": Translated("bool", _on(include_for_metrics=["inputs"])),
    # transformers.TrainingArguments: gone without a trace in the result
    "logging_dir": Dropped("figures go to metrics.jsonl in output_dir, and to the places that report_to names"),
    "include_tokens_per_second": Dropped("include_num_input_tokens_seen logs the tokens seen"),
    "use_legacy_prediction_loop": Dropped("there is one evaluation loop"),
    "use_mps_device": Dropped("an Apple GPU is used where there is one"),
    "ray_scope": Dropped("it belongs to hyperparameter search"),
    # transformers.TrainingArguments: one of two values is refused
    "overwrite_output_dir": Translated(
        "bool",
        _refuse_on(
            "Nothing is overwritten: give a new output_dir, or go on with the run in it by resume_from_checkpoint true."
        ),
        "nothing is overwritten anyway",
    ),
    "save_safetensors": Translated(
        "bool",
        lambda on: {} if on else "Weights are saved as safetensors only: leave it out.",
        "weights are always saved as safetensors",
    ),
    "half_precision_backend": Translated("str", lambda name: {} if name == "auto" else _PRECISION),
    "fp16_backend": Translated("str", lambda name: {} if name == "auto" else _PRECISION),
    "jit_mode_eval": Translated("bool", _refuse_on("TorchScript is no longer supported: give torch_compile instead.")),
    "use_ipex": Translated("bool", _refuse_on("Intel's extension is no longer supported by transformers.")),
    "past_index": Translated(
        "int", lambda index: {} if index == -1 else "Masked language models have no past states: leave it out."
    ),
    "mp_parameters": Translated(
        "str", lambda text: {} if text == "" else "SageMaker's model parallelism is not supported: leave it out."
    ),
    "tpu_metrics_debug": Translated("bool", _refuse_on(_NO_TPU)),
    # transformers.TrainingArguments: refused
    "fp16_opt_level": Refused(_PRECISION),
    "dispatch_batches": Refused(_ACCELERATOR),
    "split_batches": Refused(_ACCELERATOR),
    "fsdp_min_num_params": Refused(_SHARDED),
    "fsdp_transformer_layer_cls_to_wrap": Refused(_SHARDED),
    "sharded_ddp": Refused("FairScale's sharding is gone: give fsdp or deepspeed."),
    "tpu_num_cores": Refused(_NO_TPU),
    "push_to_hub_model_id": Refused(_PUSH),
    "push_to_hub_organization": Refused(_PUSH),
    # run_mlm and run_language_modeling, older and newer
    "use_auth_token": Translated("bool | str", _token, "the token of `hf auth login` is used, where there is one"),
    "torch_dtype": Translated("str", _dtype),
    "low_cpu_mem_usage": Dropped("weights are always loaded without a second copy"),
    "train_data_file": Renamed("train_file"),
    "eval_data_file": Renamed("validation_file"),
    "block_size": Renamed("max_seq_length"),
    "mlm": Translated("bool", lambda on: {} if on else "Only masked language models are trained here: leave it out."),
    "whole_word_mask": Translated("bool", _refuse_on(_WHOLE_WORDS)),
    "wwm": Translated("bool", _refuse_on(_WHOLE_WORDS)),
    # PEFT's LoraConfig
    "r": Renamed("lora_r"),
    "lora_rank": Renamed("lora_r"),
    "target_modules": Renamed("lora_target_modules"),
    "exclude_modules": Renamed("lora_exclude_modules"),
    "lora_modules_to_save": Renamed("modules_to_save"),
    "use_peft": Renamed("use_lora"),
    "peft_type": Renamed("peft_method"),
    "task_type": Dropped("PEFT has no task type for masked language models"),
    "inference_mode": Dropped("train trains, the other commands do not"),
    "bias": Translated(
        "str",
        lambda value: (
            {} if value == "none" else f'Give it as an option of the method: peft_config \'{{"bias": "{value}"}}\'.'
        ),
    ),
    "trainable_token_indices": Refused("Give add_tokens or add_special_tokens, whose rows are trained by themselves."),
    "bnb_4bit_quant_storage": Dropped("packed weights are stored as bytes, whatever it says"),
    # other scripts
    "model_name": Renamed("model_name_or_path"),
    "base_model_name_or_path": Renamed("model_name_or_path"),
    "pretrained_model_name_or_path": Renamed("model_name_or_path"),
    "tokenizer_name_or_path": Renamed("tokenizer_name"),
    "use_fast": Renamed("use_fast_tokenizer"),
    "revision": Renamed("model_revision"),
    "dataset_config": Renamed("dataset_config_name"),
    "text_column_name": Renamed("text_column"),
    "dataset_text_field": Renamed("text_column"),
    "max_length": Renamed("max_seq_length"),
    "num_proc": Renamed("preprocessing_num_workers"),
    "dataset_num_proc": Renamed("preprocessing_num_workers"),
    "lr": Renamed("learning_rate"),
    "epochs": Renamed("num_train_epochs"),
    "num_epochs": Renamed("num_train_epochs"),
    "validation_split": Refused("Give validation_split_percentage, in per cent."),
    "batch_size": Refused("Give per_device_train_batch_size and per_device_eval_batch_size."),
}
