"""An adapter merged into the files of its base, tensor by tensor: the model is never built, whatever its size.

What the adapter does not change is copied from file to file. To what plain LoRA changes, the product of its matrices is
added some rows at a time; the rest is merged by PEFT's own layer, which hangs in an outline of the model without
weights. In memory is one matrix at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_mlm.adapter import ADAPTER, cast_with_adapter
from peft_mlm.errors import MergeError
from peft_mlm.followed_files import FollowedFiles
from peft_mlm.head_mapping import WEIGHTS_INDEX
from peft_mlm.merge_proof import precise_type
from peft_mlm.stream_plan import StreamPlan
from peft_mlm.tensor_files import TYPES, Part, StoredTensor, read_blocks, read_tensor, write_tensors


def streamed_merge(plan: StreamPlan, dtype: str) -> Callable[[Path], Mapping[str, str]]:
    """Merge file by file.

    Args:
        plan: From `plan_stream`.
        dtype: Type of the merged weights. Sums are made in float64, for models over 500 million parameters in float32.

    Returns:
        Writes the weights, in files like the base's, and the config into an empty folder, and gives the SHA-256 of the
        files of weights. It raises MergeError where a sum is not finite.
    """
    kind = getattr(torch, dtype)

    def write(folder: Path) -> Mapping[str, str]:
        stored = {plan.names.get(t.name, t.name): t for tensors in plan.files.values() for t in tensors}
        merge = _Merger(plan, stored)
        written: dict[str, list[Part]] = {}
        for file, tensors in plan.files.items():
            written[file.name] = [_part(merge, plan.names.get(t.name, t.name), t, kind) for t in tensors]
        *_, last = written.values()
        for name in sorted(plan.replaced.keys() - stored.keys()):
            last.append(Part(name, kind, tuple(plan.replaced[name].shape), _whole(plan.replaced[name])))
        with _one_thread(), FollowedFiles() as followed:
            for file_name, parts in written.items():
                write_tensors(folder / file_name, parts, followed)
        if len(written) > 1:
            _write_index(folder, written)
        config = plan.base.model.config
        config.architectures, config.dtype = [type(plan.base.model).__name__], kind
        config.save_pretrained(str(folder))
        return {file.name: digest for file, digest in followed.sums.items()}

    return write


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread: blocks of a few rows gain nothing by more.

    Where another thread hashes what was written and cores are few, threads that wait for each other at every block make
    the merge ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Merger:
    """Makes merged tensors one after the other; of the layer in hand all are kept, since they are made together."""

    def __init__(self, plan: StreamPlan, stored: Mapping[str, StoredTensor]) -> None:
        self.plan, self.stored = plan, stored
        self.precise = precise_type(plan.model.get_base_model())
        cast_with_adapter(plan.model, self.precise)
        self.made: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self.made:
            self.made = {}  # let the last layer go before the next one is read
            self.made = self._merge(self.plan.layers[name], name.rpartition(".")[0])
        return self.made.pop(name)

    def _merge(self, layer: BaseTunerLayer, owner: str) -> dict[str, torch.Tensor]:
        inner = layer.get_base_layer()
        empty = dict(inner._parameters)
        changed = [key for key in empty if f"{owner}.{key}" in self.plan.layers]
        try:
            for key in changed:
                inner._parameters[key] = nn.Parameter(self._value(f"{owner}.{key}"), requires_grad=False)
            layer.merge(safe_merge=True)
            merged = {f"{owner}.{key}": inner._parameters[key].data for key in changed}
        except (NotImplementedError, ValueError) as error:
            raise MergeError(f"This adapter cannot be merged into its base: {error}") from error
        finally:
            inner._parameters.update(empty)
            layer.merged_adapters.clear()
        return merged

    def _value(self, name: str) -> torch.Tensor:
        if name in self.plan.replaced:
            return self.plan.replaced[name].detach().to(self.precise)
        return read_tensor(self.stored[name]).to(self.precise)


def _part(merge: _Merger, name: str, tensor: StoredTensor, dtype: torch.dtype) -> Part:
    """Say what becomes of a tensor of the base."""
    kind = TYPES[tensor.dtype]
    layer = merge.plan.layers.get(name)
    if _is_plain(layer, name) and name not in merge.plan.replaced:
        return Part(name, dtype, tensor.shape, lambda: _add_product(layer, tensor, merge.precise, dtype))
    if layer is not None:
        return Part(name, dtype, tensor.shape, lambda: [merge(name)])
    if name in merge.plan.replaced:
        return Part(name, dtype, tensor.shape, _whole(merge.plan.replaced[name]))
    if kind.is_floating_point and kind != dtype:
        return Part(name, dtype, tensor.shape, lambda: read_blocks(tensor))
    return Part(name, kind, tensor.shape, tensor)


def _whole(value: torch.Tensor) -> Any:
    return lambda: [value.detach()]


def _is_plain(layer: BaseTunerLayer | None, name: str) -> bool:
    """Tell whether W + scaling * B A is all there is to merge a weight."""
    return layer is not None and type(layer) is Linear and not layer.lora_variant and name.endswith(".weight")


def _add_product(layer: Any, tensor: StoredTensor, precise: torch.dtype, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Merge plain LoRA, which is most of what is merged, some rows at a time: one pass over the weights, not seven."""
    left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    if layer.fan_in_fan_out:
        left, right = right.T, left.T
    start = 0
    for rows in read_blocks(tensor):
        block = rows.to(precise, copy=True)
        block.addmm_(left[start : start + len(block)], right, alpha=layer.scaling[ADAPTER])
        start += len(block)
        rounded = block.to(dtype)
        # The sum is not finite where a number is not, and is faster found; seldom it alone is too large.
        if not math.isfinite(float(rounded.sum())) and not rounded.isfinite().all():
            raise MergeError(
                f"This adapter cannot be merged into its base: a sum in {tensor.name} is not finite in "
                f"{str(dtype).removeprefix('torch.')}. Use another --dtype, or take the adapter from its source again."
            )
        yield rounded


def _write_index(folder: Path, written: Mapping[str, list[Part]]) -> None:
    placed = {part.name: file for file, parts in written.items() for part in parts}
    sizes = [(torch.Size(p.shape).numel(), p.dtype.itemsize) for parts in written.values() for p in parts]
    metadata = {"total_parameters": sum(n for n, _ in sizes), "total_size": sum(n * size for n, size in sizes)}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(placed.items()))}, indent=2)
    (folder / WEIGHTS_INDEX).write_text(text + "\n", encoding="utf-8")
