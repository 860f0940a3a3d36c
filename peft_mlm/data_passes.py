"""Passes over training data that some starts of LoRA's matrices are made from.

LoRA-GA: Wang et al. 2024, https://arxiv.org/abs/2407.05000. CorDA: Yang et al. 2024, https://arxiv.org/abs/2406.05223.
EVA: Paischer et al. 2024, https://arxiv.org/abs/2410.07170. A pass is made in evaluation mode, over a bounded number of
batches, and leaves generators of random numbers as they were.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.tuners_utils import check_target_module_exists as is_target
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mlm.document_attention import documents_apart
from peft_mlm.errors import AdapterError
from peft_mlm.metrics import masked_lm_loss
from peft_mlm.quantization import is_quantised

PASS_BATCHES = 32
# EVA goes over the batches until its directions hold still; this often at most.
EVA_ROUNDS = 20
# Share of the mean variance that is added to every input's, as in the authors' code.
CORDA_DAMPING = 0.01


@dataclass(frozen=True)
class DataPass:
    """The batches that a start is made from: the run's own training rows, drawn at random, masked as in training.

    Attributes:
        rows: Training rows, with `input_ids`.
        collator: Makes batches with `input_ids`, `attention_mask` and `labels`.
        batch_size: Rows per batch.
        seed: Of the draw.
        device: Where the pass is computed.
        batches: How many batches, at most.
    """

    rows: Dataset
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    batch_size: int
    seed: int
    device: torch.device
    batches: int = PASS_BATCHES

    def load(self) -> list[dict[str, torch.Tensor]]:
        """Make the batches."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.rows), generator=generator)[: self.batches * self.batch_size].tolist()
        parts = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        return [
            {name: tensor.to(self.device) for name, tensor in self.collator([self.rows[i] for i in part]).items()}
            for part in parts
        ]


def leave_gradients(model: PreTrainedModel, config: Any, data: DataPass) -> None:
    """Leave on each target layer the mean gradient of the loss over the batches (LoRA-GA).

    PEFT's own preprocessing hooks each layer's output, which models that change it in place do not bear, and switches
    dropout on.

    Args:
        model: The base, without adapter.
        config: PEFT's LoRA configuration; `lora_ga_config` is filled in where it is missing.
        data: The batches.
    """
    config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
    layers = [module for name, module in model.named_modules() if is_target(config, name)]
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with _pass_over(model, data) as batches:
        model.requires_grad_(False)
        for layer in layers:
            layer.weight.requires_grad_(True)
        for batch in batches:
            labels = batch.pop("labels")
            torch.autograd.backward(masked_lm_loss(model, batch, labels))
    for layer in layers:
        if layer.weight.grad is not None:
            layer._peft_loraga_grad = layer.weight.grad / len(batches)
        layer.weight.grad = None
    for parameter, was_needed in needed.items():
        parameter.requires_grad_(was_needed)


@torch.no_grad()
def leave_covariances(model: PreTrainedModel, config: Any, data: DataPass) -> None:
    """Leave on each target layer the singular directions of its weight times the covariance of its inputs (CorDA).

    W C = U S V', so that W = U S (V' C^-1), ordered by what the inputs use. PEFT's own preprocessing takes one row at a
    time and counts padding.

    Args:
        model: The base, without adapter.
        config: PEFT's LoRA configuration; `corda_config` is filled in where it is missing.
        data: The batches.
    """
    config.corda_config = config.corda_config or CordaConfig()
    layers = {name: module for name, module in model.named_modules() if is_target(config, name)}
    covariance: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def watch(name: str, real: torch.Tensor) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any) -> None:
            rows = _without_padding(inputs, real, name).double()
            covariance[name] = covariance.get(name, 0) + rows.T @ rows
            counts[name] += len(rows)

        return hook

    with _pass_over(model, data) as batches:
        for batch in batches:
            real = batch["attention_mask"].bool()
            handles = [module.register_forward_pre_hook(watch(name, real)) for name, module in layers.items()]
            _run(model, batch)
            for handle in handles:
                handle.remove()
    for name, total in covariance.items():
        matrix = total / counts[name]
        matrix.diagonal().add_(CORDA_DAMPING * matrix.diagonal().mean())  # so that it can be inverted
        weight = layers[name].weight.double()
        weight = weight.T if isinstance(layers[name], Conv1D) else weight
        u, s, vh = torch.linalg.svd(weight @ matrix, full_matrices=False)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        part = slice(None, rank) if config.corda_config.corda_method == "ipm" else slice(-rank, None)
        v = torch.linalg.solve(matrix, vh[part].T)
        layers[name].eigens = SimpleNamespace(U_WC=u[:, part].float(), S_WC=s[part].float(), V_WC=v.float())


def eva_directions(model: PreTrainedModel, config: Any, data: DataPass) -> dict[str, torch.Tensor]:
    """Find the principal directions of each target layer's inputs at all positions but padding (EVA).

    Args:
        model: The base, without adapter.
        config: PEFT's LoRA configuration; `eva_config` is filled in where it is missing.
        data: The batches.

    Returns:
        (rank, in) by layer; ranks are spread by explained variance.

    Raises:
        AdapterError: The directions do not settle.
    """
    config.eva_config = config.eva_config or EvaConfig()
    left = EVA_ROUNDS * data.batches

    def forward(module: Any, batch: dict[str, torch.Tensor]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise AdapterError(
                f"init_lora_weights eva: after {EVA_ROUNDS} rounds over {data.batches} batches the directions still "
                f"move. Use more rows per batch, a smaller lora_r, or a lower tau than {config.eva_config.tau} "
                '(--peft_config \'{"eva_config": {"tau": 0.9}}\').'
            )
        return _run(module, batch)

    # PEFT prints to stdout which layers it skips
    with _pass_over(model, data) as batches, contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, torch.Tensor] = get_eva_state_dict(
            model,
            batches,
            peft_config=config,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _: batch["attention_mask"].bool(),
            prepare_layer_inputs_fn=_without_padding,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    return found


def _run(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
    with documents_apart(model, {name: tensor for name, tensor in batch.items() if name != "labels"}) as inputs:
        return model(**inputs)


@contextlib.contextmanager
def _pass_over(model: PreTrainedModel, data: DataPass) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Batches and a model on their device, in evaluation mode; generators and modes are as before afterwards."""
    was_training, states = model.training, (random.getstate(), np.random.get_state())
    if not is_quantised(model):
        model.to(data.device)  # where the trainer would put it; a quantised model is there already
    try:
        with torch.random.fork_rng():
            torch.manual_seed(data.seed)
            model.eval()
            yield data.load()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.train(was_training)


def _without_padding(layer_input: Any, real: torch.Tensor, _: str) -> torch.Tensor:
    """Choose the inputs (N, H) of a layer at real tokens; an input that is not by position is taken whole."""
    tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    return tensor[real] if tensor.shape[:-1] == real.shape else tensor.reshape(-1, tensor.shape[-1])
