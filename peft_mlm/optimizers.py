"""Optimisers that treat a LoRA adapter's two matrices differently: LoRA+ and LoRA-FA.

LoRA+: Hayou et al. 2024, https://arxiv.org/abs/2402.12354. LoRA-FA: Zhang et al. 2023, https://arxiv.org/abs/2308.03303;
its gradient for B alone follows LoRA-FA's implementation in PEFT, which this module sets up.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.optimizers import create_lorafa_optimizer
from transformers import TrainingArguments

from peft_mlm.adapter import ADAPTER
from peft_mlm.errors import AdapterError, ArgumentsError

# What optimisers for layers one by one want instead of groups of parameters (LOMO, GaLore, APOLLO and the like).
NO_GROUPS = ("params", "model", "optimizer_dict")


def loraplus_optimizer(
    model: PeftModel,
    optimizer_class: type[torch.optim.Optimizer],
    options: dict[str, Any],
    *,
    ratio: float,
    weight_decay: float,
    decayed: Collection[str],
) -> torch.optim.Optimizer:
    """Make an optimiser that gives the B matrices a higher learning rate: LoRA+.

    All else that is trained (A matrices, DoRA's magnitudes, trained modules, token rows) keeps the learning rate.
    PEFT's own helper raises it for the biases and norms of trained modules too, and lowers it to 1e-6 for embeddings.

    Args:
        model: The model with its adapter.
        optimizer_class: That of `--optim`.
        options: Its options; `lr` is the learning rate.
        ratio: Learning rate of B / learning rate.
        weight_decay: For the parameters named in `decayed`.
        decayed: Full names of the parameters that decay: neither biases nor norms.

    Returns:
        The optimiser. Its first group has the plain learning rate, which logs show.

    Raises:
        AdapterError: The adapter has no B matrices that are trained.
        ArgumentsError: The optimiser takes no groups of parameters.
    """
    check_loraplus(model, ratio, optimizer_class, options)
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for is_b in (False, True):
        for decays in (True, False):
            groups[is_b, decays] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_is_b(name), name in decayed].append(parameter)
    rate = options["lr"]
    return optimizer_class(
        [
            {
                "params": parameters,
                "lr": rate * ratio if is_b else rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (is_b, decays), parameters in groups.items()
        ],
        **options,
    )


def lorafa_optimizer(
    model: PeftModel, arguments: TrainingArguments, *, decayed: Collection[str]
) -> torch.optim.Optimizer:
    """Make the optimiser of LoRA-FA: the A matrices stay, B gets the gradient that fits the whole product best.

    Trained modules and token rows are trained by plain AdamW within it.

    Args:
        model: The model with its adapter; its A matrices are frozen.
        arguments: Learning rate, weight decay, Adam's constants.
        decayed: Full names of the parameters that decay: neither biases nor norms.

    Returns:
        The optimiser.

    Raises:
        AdapterError: The adapter is not plain LoRA.
        ArgumentsError: `--optim` asks for another optimiser.
    """
    check_lorafa(model, arguments)
    config = model.peft_config[ADAPTER]
    optimizer = create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    # PEFT puts every parameter of the base into one group, and lets biases and norms decay.
    whole = optimizer.param_groups.pop()
    entries = list(zip(whole.pop("params"), whole.pop("names"), whole.pop("scaling_factors"), strict=True))
    constants = {**whole, "betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    for decays in (True, False):
        # A's entry stands before B's: the optimiser reads them as a pair
        kept = [
            e for e in entries if (e[0].requires_grad or _is_a(e[1])) and (_is_pair(e[1]) or e[1] in decayed) == decays
        ]
        if kept:
            parameters, names, scaling = zip(*kept, strict=True)
            group = {"params": list(parameters), "names": list(names), "scaling_factors": list(scaling)}
            decay = arguments.weight_decay if decays else 0.0
            optimizer.add_param_group({**constants, **group, "weight_decay": decay})
    return optimizer


def check_loraplus(model: PeftModel, ratio: float, optimizer_class: Any, options: dict[str, Any]) -> None:
    """Refuse LoRA+ where there are no B matrices to train, or no learning rate for them alone.

    Args:
        model: The model with its adapter.
        ratio: Learning rate of B / learning rate.
        optimizer_class: That of `--optim`.
        options: Its options.

    Raises:
        AdapterError: The method is not LoRA, or its B matrices are frozen (MiCA).
        ArgumentsError: The ratio is not above 0, or the optimiser takes no groups of parameters.
    """
    if not ratio > 0:
        raise ArgumentsError(f"loraplus_lr_ratio is {ratio}: give a number above 0, such as 16.")
    if any(name in options for name in NO_GROUPS) or not issubclass(optimizer_class, torch.optim.Optimizer):
        raise ArgumentsError(
            "loraplus_lr_ratio needs an optimiser with a learning rate per group of parameters; the one that --optim "
            "names has none. Use --optim adamw_torch, or leave loraplus_lr_ratio out."
        )
    method = model.peft_config[ADAPTER].peft_type
    trained = any(_is_b(name) and parameter.requires_grad for name, parameter in model.named_parameters())
    if method != PeftType.LORA or not trained:
        raise AdapterError(
            "loraplus_lr_ratio gives LoRA's B matrices a learning rate of their own; this adapter "
            f"({_method_name(model)}) trains none. Leave it out."
        )


def check_lorafa(model: PeftModel, arguments: TrainingArguments) -> None:
    """Refuse LoRA-FA where its optimiser would be wrong.

    Args:
        model: The model with its adapter.
        arguments: `optim` must be the default.

    Raises:
        AdapterError: The adapter is not plain LoRA on linear layers.
        ArgumentsError: `--optim` asks for another optimiser.
    """
    if not str(getattr(arguments.optim, "value", arguments.optim)).startswith("adamw_torch"):
        raise ArgumentsError(
            f"use_lorafa is an optimiser of its own (a form of AdamW); --optim {arguments.optim} asks for another. "
            "Leave one of them out."
        )
    config = model.peft_config[ADAPTER]
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    if config.peft_type != PeftType.LORA or any(not _is_pair(name) for name in names):
        # its optimiser takes whatever has "lora" in its name for a pair of matrices, DoRA's magnitudes included
        raise AdapterError(
            f"use_lorafa trains the B matrices of plain LoRA on linear layers; this adapter ({_method_name(model)}) "
            "has others. Leave it out."
        )
    if config.init_lora_weights == "mica":
        raise AdapterError("use_lorafa trains B alone, init_lora_weights mica A alone: leave one of them out.")


def freeze_a(model: PeftModel) -> None:
    """Freeze the A matrices, as LoRA-FA does, so that they count as frozen from the start.

    Args:
        model: The model with its adapter.
    """
    for name, parameter in model.named_parameters():
        if _is_a(name):
            parameter.requires_grad_(False)


def _is_a(name: str) -> bool:
    return ".lora_A." in name


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def _is_pair(name: str) -> bool:
    return name.endswith((f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"))


def _method_name(model: PeftModel) -> str:
    config = model.peft_config[ADAPTER]
    method = str(config.peft_type.value).lower()
    return f"{method}, init_lora_weights {config.init_lora_weights}" if method == "lora" else method
