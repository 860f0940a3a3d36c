"""Methods that move rank between layers while they train: AdaLoRA, and AdaMSS with `use_asa`.

AdaLoRA: Zhang et al. 2023, https://openreview.net/forum?id=lq62uWRJjiY. AdaMSS: Zheng et al. 2025, in PEFT's
implementation. Trainer calls neither's allocation, and AdaLoRA's penalty reaches only a loss that the model itself
computes; here both are part of training. A step counts once it is done, so that the first is 1: AdaLoRA's budget is the
whole until `tinit` steps are done, and `target_r` per layer once `total_step - tfinal` are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.adamss.layer import AdamssLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mlm.adapter import ADAPTER
from peft_mlm.errors import AdapterError

# The running means that AdaLoRA's importance is made of.
STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
ASA_STATISTICS = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


def has_rank_schedule(model: Any) -> bool:
    """Tell whether ranks move between layers while this model trains.

    An AdaLoRA adapter that training goes on from has been cut to its final ranks already; they stay.

    Args:
        model: With or without an adapter.

    Returns:
        True for a new AdaLoRA adapter, and for AdaMSS with `use_asa`.
    """
    return _allocates(model) or _has_asa(model)


class RankSchedule(TrainerCallback):
    """Allocates ranks after each optimiser step, while the gradients are still there.

    `checkpoint` is set where a run goes on: what `schedule_state` gave when the checkpoint was written, and its folder.
    A run that is too short for the schedule is refused when training begins (AdapterError).
    """

    def __init__(self) -> None:
        self.checkpoint: tuple[Mapping[str, torch.Tensor], Path] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell AdaLoRA how many steps this run has, and go on where a checkpoint left the schedule."""
        model = kwargs["model"]
        if _allocates(model):
            model.peft_config[ADAPTER].total_step = state.max_steps
        check_rank_schedule(model.peft_config[ADAPTER], state.max_steps)
        if self.checkpoint is not None:  # now, since the optimiser must know the paused parameters too
            load_schedule_state(model, *self.checkpoint)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weigh importance by the gradients of this step, and cut to the budget."""
        if not kwargs["optimizer"].step_was_skipped:  # gradients that are not finite would spoil the running means
            kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def check_rank_schedule(config: Any, steps: int) -> None:
    """Check that a schedule fits into the steps of a run.

    Args:
        config: Configuration of AdaLoRA, or of AdaMSS with `use_asa`.
        steps: Optimiser steps of the run.

    Raises:
        AdapterError: There is nothing to cut, or no step left to cut in.
    """
    if config.peft_type == PeftType.ADAMSS:
        if config.final_warmup > steps or config.final_warmup % config.mask_interval:
            raise AdapterError(
                f"adamss with use_asa cuts at every mask_interval-th step ({config.mask_interval}) and reaches "
                f"asa_target_subspaces at step final_warmup ({config.final_warmup}): that must be a multiple, and this "
                f"run has {steps} steps. Give other values by --peft_config, or train longer."
            )
        return
    if config.target_r >= config.init_r:
        raise AdapterError(
            f"adalora cuts rank from init_r to target_r: init_r is {config.init_r}, target_r {config.target_r}. Give a "
            "smaller target_r."
        )
    last = steps - config.tfinal
    if last < 2 or config.tinit >= last:
        raise AdapterError(
            f"adalora has no time to cut ranks: of {steps} steps, tinit keeps the first {config.tinit} and tfinal the "
            f"last {config.tfinal}. Train longer, or give smaller values by --peft_config."
        )


def planned_steps(rows: int, arguments: TrainingArguments, *, batches: int | None = None) -> int:
    """Count the optimiser steps of a run, as Trainer does.

    Args:
        rows: Rows to train on.
        arguments: Batch size, accumulation, epochs or steps, processes.
        batches: Batches per epoch, where they are not of a number of rows.

    Returns:
        The number of steps.
    """
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    size, processes = arguments.train_batch_size, arguments.world_size
    drops = arguments.dataloader_drop_last
    if batches is None:
        batches = rows // size // processes if drops else math.ceil(math.ceil(rows / size) / processes)
    return math.ceil(arguments.num_train_epochs * max(math.ceil(batches / arguments.gradient_accumulation_steps), 1))


def orthogonal_penalty(model: Any) -> torch.Tensor | None:
    """Compute AdaLoRA's penalty: lambda times the mean of |A A' - I| and |B' B - I| (Frobenius) over all layers.

    It keeps A and B near to singular vectors, so that the values between them tell the importance. To be added to the
    loss once per optimiser step.

    Args:
        model: With or without an adapter.

    Returns:
        A scalar that carries gradients; None for other methods.
    """
    if not _is_adalora(model):
        return None
    norms = []
    with torch.autocast(model.device.type, enabled=False):
        for name, parameter in model.named_parameters():
            if f".lora_A.{ADAPTER}" in name or f".lora_B.{ADAPTER}" in name:
                product = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product)))
    return model.peft_config[ADAPTER].orth_reg_weight * torch.stack(norms).mean()


def describe_ranks(model: Any, step: int) -> dict[str, int]:
    """Tell how much rank is left.

    Args:
        model: With or without an adapter.
        step: Optimiser steps done.

    Returns:
        AdaLoRA: `rank_budget`, what the schedule allows at this step over all layers, and `rank_total`, what the last
        allocation has left. AdaMSS: `active_subspaces`. Empty for other methods.
    """
    if _allocates(model):
        allocator = model.base_model.rankallocator
        pattern = model.peft_config[ADAPTER].rank_pattern
        left = allocator.init_bgt if not pattern else sum(sum(kept) for kept in pattern.values())
        return {"rank_budget": int(allocator.budget_schedule(step)[0]), "rank_total": int(left)}
    if _has_asa(model):
        layers = _asa_layers(model).values()
        return {"active_subspaces": sum(p.requires_grad for layer in layers for p in layer.adamss_A[ADAPTER])}
    return {}


def settle_ranks(model: Any) -> None:
    """See to it that what is saved is what the model computes now.

    PEFT saves the directions that the last allocation left. Between two allocations the others learn on; those that
    have an effect now are saved too.

    Args:
        model: With or without an adapter.
    """
    if not (_allocates(model) and model.peft_config[ADAPTER].rank_pattern):
        return
    config = model.peft_config[ADAPTER]
    settled = {}
    for name, parameter in model.base_model.model.named_parameters():
        key, short = name, name.removesuffix(f".{ADAPTER}")
        if f".lora_E.{ADAPTER}" in name:
            kept = config.rank_pattern[key] if key in config.rank_pattern else config.rank_pattern[short]
            live = (parameter != 0).view(-1).tolist()
            settled[key] = [one or other for one, other in zip(kept, live, strict=True)]
    config.rank_pattern = settled


def schedule_state(model: Any) -> dict[str, torch.Tensor]:
    """Give what the schedule has gathered, to be kept in a checkpoint.

    Args:
        model: With or without an adapter.

    Returns:
        Tensors by name; empty for methods without a schedule.
    """
    state: dict[str, torch.Tensor] = {}
    if _allocates(model):
        for which in STATISTICS:
            for name, tensor in getattr(model.base_model.rankallocator, which).items():
                state[f"{which}/{name}"] = tensor
    if _has_asa(model):
        for name, layer in _asa_layers(model).items():
            for which in ASA_STATISTICS:
                for number, tensor in enumerate(getattr(layer, which)[ADAPTER]):
                    if tensor is not None:
                        state[f"{which}/{number}/{name}"] = tensor
            trained = [parameter.requires_grad for parameter in layer.adamss_A[ADAPTER]]
            state[f"trained/{name}"] = torch.tensor(trained)
    return state


def load_schedule_state(model: Any, state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Set what the schedule had gathered when a checkpoint was written.

    Args:
        model: The model as it was wrapped.
        state: From `schedule_state`.
        checkpoint: The checkpoint; its configuration holds the ranks left.
    """
    device = next(model.parameters()).device
    if _allocates(model):
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        model.peft_config[ADAPTER].rank_pattern = config["rank_pattern"]
        model.base_model.rankallocator.reset_ipt()
        for key, tensor in state.items():
            which, _, name = key.partition("/")
            getattr(model.base_model.rankallocator, which)[name] = tensor.to(device)
    if _has_asa(model):
        layers = _asa_layers(model)
        for layer in layers.values():
            layer.reset_importance(ADAPTER)
        for key, tensor in state.items():
            which, _, rest = key.partition("/")
            if which == "trained":
                for which_matrix in (layers[rest].adamss_A, layers[rest].adamss_B):
                    for parameter, trained in zip(which_matrix[ADAPTER], tensor.tolist(), strict=True):
                        parameter.requires_grad_(trained)
                continue
            number, _, name = rest.partition("/")
            getattr(layers[name], which)[ADAPTER][int(number)] = tensor.to(device)


def _is_adalora(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.peft_config[ADAPTER].peft_type == PeftType.ADALORA


def _allocates(model: Any) -> bool:
    """Tell whether all directions that AdaLoRA started with are still there to be chosen from."""
    if not _is_adalora(model):
        return False
    rows = sum(p.shape[0] for name, p in model.named_parameters() if f".lora_E.{ADAPTER}" in name)
    return bool(rows == model.base_model.rankallocator.init_bgt)


def _has_asa(model: Any) -> bool:
    if not isinstance(model, PeftModel):
        return False
    config = model.peft_config[ADAPTER]
    return config.peft_type == PeftType.ADAMSS and config.use_asa


def _asa_layers(model: PeftModel) -> dict[str, AdamssLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdamssLayer)}
