"""The memory that a run's tensors would take, counted by running the very same code on tensors without values.

`FakeTensorMode` (PyTorch) runs every operation on shapes and types alone: in seconds, without weights. A dispatch mode
counts the storages that are alive after each operation, as autograd, the model's code and our own loss keep and free
them. What depends on values is settled here: how many tokens of a batch are masked, whether it has padding; a number
that is read out of a tensor is 0, two tensors are different.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that the operations within a `with` block make and that are alive.

    `peak` holds these bytes by kind, at the moment when their sum was largest.

    Args:
        masked: Rows that picking by a mask gives: the masked tokens of a batch. None where tensors have values, which
            tell it: then nothing is settled here.
        padded: Whether a batch has padding: what `all` says of an attention mask.
        kind: Names the kind of a tensor by its shape; the bytes of each kind are counted apart.
        held: Tensors that are there anyway, such as weights: they are not counted.
    """

    def __init__(
        self,
        *,
        masked: int | None = None,
        padded: bool = False,
        kind: Callable[[torch.Tensor], str] | None = None,
        held: Iterable[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        self.masked, self.padded, self.kind = masked, padded, kind or (lambda tensor: "activations")
        self.peak: dict[str, int] = {}
        self._now: dict[str, int] = {}
        self._total = self._largest = 0
        self._kinds: dict[int, str] = {}
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._alive: dict[int, weakref.ref[Any]] = {}
        # Tensors of one value throughout, which is known: X-MOD numbers the languages of rows by them.
        self._values: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or settle what it gives where that depends on values, and count what it made."""
        kwargs = kwargs or {}
        if self.masked is None:
            result = func(*args, **kwargs)
        else:
            result = self._settle(func, args, kwargs, self.masked)
            self._note(func, args, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _settle(self, func: Any, args: Any, kwargs: dict[str, Any], masked: int) -> Any:
        if func is aten._local_scalar_dense.default:
            try:
                return func(*args)
            except (DataDependentOutputException, RuntimeError):  # without values; on the meta device
                return False if args[0].dtype == torch.bool else 0
        if func in (aten.all.default, aten.all.dim):
            # of an attention mask: whether it can be left out
            return func(*args, **kwargs) if func is aten.all.dim else _constant(not self.padded)
        if func is aten.equal.default:
            return False
        if func is aten.count_nonzero.default:
            return _constant(0 if args[0].dim() == 1 else 1)  # a fresh bias is zero, a fresh matrix is not
        if func is aten.nonzero.default:
            return args[0].new_empty((self._chosen(args[0], masked), args[0].dim()), dtype=torch.int64)
        if func is aten.masked_select.default:
            return args[0].new_empty((masked,))
        if func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            mask = next(index for index in args[1] if _is_mask(index))
            return _index_by_mask(args[0], args[1], self._chosen(mask, masked))
        return func(*args, **kwargs)

    def _note(self, func: Any, args: Any, result: Any) -> None:
        """Keep the value of tensors that have one throughout."""
        known = [self._values.get(x, x) if isinstance(x, torch.Tensor) else x for x in args[:2]]
        value = None
        if func is aten.ones.default:
            value = 1
        elif func in (aten.mul.Tensor, aten.eq.Scalar) and all(isinstance(x, int | float) for x in known):
            value = known[0] * known[1] if func is aten.mul.Tensor else known[0] == known[1]
        if value is not None:
            self._values[result] = value

    def _chosen(self, mask: torch.Tensor, masked: int) -> int:
        value = self._values.get(mask)
        return masked if value is None else mask.numel() if value else 0

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._held or not size:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self._add(self._kinds.pop(key), -size)

        self._alive[key] = weakref.ref(storage, freed)
        self._kinds[key] = kind = self.kind(tensor)
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self._now[kind] = self._now.get(kind, 0) + size
        self._total += size
        if self._total > self._largest:
            self._largest, self.peak = self._total, dict(self._now)

    def rename(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor as another kind from now on.

        Args:
            tensor: One that is alive.
            kind: The kind.
        """
        storage = tensor.untyped_storage()
        before = self._kinds.get(storage._cdata)
        if before is not None:
            self._now[before] -= storage.nbytes()
            self._now[kind] = self._now.get(kind, 0) + storage.nbytes()
            self._kinds[storage._cdata] = kind


def _constant(value: int | bool) -> torch.Tensor:
    """Make a number that can be read out again."""
    return torch.tensor(value)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _index_by_mask(tensor: torch.Tensor, indices: Any, masked: int) -> torch.Tensor:
    """Pick by one mask and, beside it, by whole dimensions."""
    shape: list[int] = []
    at = 0
    for index in indices:
        if _is_mask(index):
            if index.shape != tensor.shape[at : at + index.dim()]:
                raise IndexError("The shape of the mask does not fit that of the tensor.")
            shape.append(masked)
            at += index.dim()
        elif index is None:
            shape.append(tensor.shape[at])
            at += 1
        else:
            at += 1  # goes together with the mask's rows
    return tensor.new_empty((*shape, *tensor.shape[at:]))


@contextlib.contextmanager
def without_values(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Let a model run on shapes alone within a `with` block: its tensors become CPU tensors without values.

    Args:
        model: On any device, also meta; tied parameters stay tied. Afterwards it is as it was.

    Yields:
        The mode, which is on: tensors made within have no values either.
    """
    mode, log = FakeTensorMode(), logging.getLogger("torch._subclasses.fake_tensor")
    made: dict[int, torch.Tensor] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
            if isinstance(tensor, Params4bit):  # what PEFT looks at
                made[id(tensor)].__dict__.update(vars(tensor))
        return made[id(tensor)]

    def replace(holder: dict[str, Any], name: str, value: Any) -> None:
        before.append((holder, name, holder[name]))
        holder[name] = value

    with mode:
        for module in model.modules():
            for holder in (module._parameters, module._buffers, vars(module)):
                for name, value in list(holder.items()):
                    if isinstance(value, torch.Tensor):
                        replace(holder, name, twin(value))
        # transformers would leave open whether a mask is needed, and the log tells of every try that fails.
        tracing, disabled = masking_utils.is_tracing, log.disabled
        masking_utils.is_tracing, log.disabled = lambda tensor=None: False, True
        try:
            yield mode
        finally:
            masking_utils.is_tracing, log.disabled = tracing, disabled
            for holder, name, value in before:
                holder[name] = value
