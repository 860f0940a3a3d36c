"""One cell of methods x bases, seen by running it: a tiny BERT, wrapped, trained, saved, reloaded, merged.

`run_cell` is what the tests and the table in the documentation are made from. Nothing here believes `methods.py`: the
reference after saving is plain PEFT on the untouched base, and the reference for a merge is the model that was trained.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedModel

from peft_mlm.adapter import cast_with_adapter, load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.methods import METHODS, VARIANTS, Base
from tests.tiny import difference, logits_at, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
LABELS = torch.where(IDS == 4, 7, -100)
BASES: tuple[Base, ...] = ("float", "nf4", "fp4", "int8")
STEPS, LEARNING_RATE = 4, 2e-2
# Of the tiny model; 4-bit blocks hold 64 numbers.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
# Options that fit a tiny model, where PEFT's defaults are made for large ones.
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "adamss": {"r": 8},
    "deft": {"r": 4},
    "fourierft": {"n_frequency": 50},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "lily": {"r": 4},
    "lora": {"r": 4},
    "oft": {"oft_block_size": 8},
    "osf": {},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [5, 6, 9, 13]},
    "vblora": {"num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}
# Options that ask for a variant, as PEFT names them; the others of `VARIANTS` need data, or an optimiser.
VARIANT_OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {"num_groups": 4}},
    "bdlora": {
        "use_bdlora": {
            "target_modules_bd_a": ["query", "dense"],
            "target_modules_bd_b": ["key", "value"],
            "nblocks": 2,
        }
    },
    "rank_pattern": {"rank_pattern": {"query": 2}},
    "alpha_pattern": {"alpha_pattern": {"query": 2.0}},
}
# Those whose start edits the base: plain PEFT saves them for the edited base, so that only our own training of them
# (`initialization.py`) is right on the untouched one.
NEEDS_OWN_SAVING = ("pissa", "olora")


@dataclass
class Cell:
    """What was seen of one method, or variant, on one kind of base; differences are the largest of any logit.

    Attributes:
        method: Name of the method.
        variant: Name of the variant, or None.
        base: Kind of base.
        trainable: Number of trained parameters.
        start: Before training, to the base.
        effect: After training, to the base.
        without_gradient: Trained parameters that never got a gradient other than zero.
        finite: Whether all gradients were finite.
        reload: Saved, and loaded by plain PEFT on the untouched base, to the trained model.
        merge: Merged (on a dequantised base), to the adapter on that same base; None where it is not merged.
        dequantised: The adapter on the dequantised base, to the trained model: 0 for 4 bits, and for 8 bits what
            rounding the inputs of the layers comes to. None for a float base.
        kilobytes: Size of the file of weights.
        failed: The step that raised, with what it raised; empty where all went through.
    """

    method: str
    variant: str | None
    base: Base
    trainable: int = 0
    start: float = math.nan
    effect: float = math.nan
    without_gradient: list[str] = field(default_factory=list)
    finite: bool = True
    reload: float = math.nan
    merge: float | None = None
    dequantised: float | None = None
    kilobytes: float = 0.0
    failed: str = ""


def cells() -> list[tuple[str, str | None]]:
    """List the methods, and the variants that can be run without data or an optimiser of their own."""
    methods: list[tuple[str, str | None]] = [(name, None) for name, row in METHODS.items() if not row.refused]
    return [*methods, *((VARIANTS[name].method, name) for name in VARIANT_OPTIONS)]


def save_tiny_base(folder: Path, model_type: str = "bert", *, layers: int = 2) -> Path:
    """Save the tiny base that cells are run on."""
    with quietly():
        sizes = {"num_hidden_layers": layers, **SIZES}
        tiny_model(model_type, **sizes).save_pretrained(folder)
    return folder


def load_base_of_kind(folder: Path, base: Base) -> PreTrainedModel:
    """Load the base in float32 or quantised, its head always in float32; from the second time on, copy it."""
    return copy.deepcopy(_load(folder, base))


@functools.cache
def _load(folder: Path, base: Base) -> PreTrainedModel:
    with quietly():
        if base == "float":
            return AutoModelForMaskedLM.from_pretrained(folder).eval()
        head = ["cls", "lm_head", "head", "decoder"]
        if base == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=head)
        else:
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=base,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=head,
            )
        model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=how).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would round to bfloat16, and let no gradient through
    return model


def dequantised_base(folder: Path, base: Base) -> PreTrainedModel:
    """Load a quantised base and give it float32 weights again, the ones it computes with."""
    with quietly():
        model = load_base_of_kind(folder, base).dequantize()
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # (IA)³ asks for these
    return model


def options_of(method: str, variant: str | None) -> dict[str, Any]:
    """Give the options of a cell by PEFT's names."""
    return SMALL.get(method, {}) | VARIANT_OPTIONS.get(variant or "", {})


def run_cell(folder: Path, method: str, variant: str | None, base: Base) -> Cell:
    """Run one cell as we build it: planned, wrapped, trained, saved, reloaded, merged.

    Args:
        folder: From `save_tiny_base`.
        method: Name of the method.
        variant: Name of the variant, or None.
        base: Kind of base.

    Returns:
        What was seen.
    """
    # AdaMSS takes a second per layer.
    named = ["query", "intermediate.dense"] if method == "adamss" else None
    arguments = PEFTArguments(peft_method=method, peft_config=options_of(method, variant), lora_target_modules=named)

    def adapt(model: PreTrainedModel) -> PeftModel:
        return wrap(model, plan_adapter(model, arguments, total_steps=100))

    return _run(Cell(method, variant, base), folder, adapt, merges=not METHODS[method].merge)


def run_plain_cell(folder: Path, method: str, variant: str | None, base: Base, config: PeftConfig) -> Cell:
    """Run one cell as plain PEFT does it, without any of our refusals and repairs."""
    return _run(Cell(method, variant, base), folder, lambda model: get_peft_model(model, config), merges=True)


def _run(cell: Cell, folder: Path, adapt: Any, *, merges: bool) -> Cell:
    torch.manual_seed(0)
    step = "load"
    try:
        with quietly(), tempfile.TemporaryDirectory() as temporary:
            model = load_base_of_kind(folder, cell.base)
            before = logits(model)
            step = "wrap"
            adapted = adapt(model)
            cell.trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            cell.start = difference(logits(adapted), before)
            step = "train"
            _train(cell, adapted)
            trained = logits(adapted)
            cell.effect = difference(trained, before)
            step = "reload"
            saved = Path(temporary)
            save_adapter(adapted, saved, base_name="base")
            cell.kilobytes = (saved / "adapter_model.safetensors").stat().st_size / 1000
            cell.reload = difference(logits(reload(load_base_of_kind(folder, cell.base), saved)), trained)
            step = "merge"
            if cell.base == "float":
                again = reload(load_base_of_kind(folder, cell.base), saved)
                expected = trained
            else:
                again = reload(dequantised_base(folder, cell.base), saved)
                expected = logits(again)
                cell.dequantised = difference(expected, trained)
            if merges:
                # In float32 the same sums in another order differ by as much as 1e-5 where weights are large.
                cast_with_adapter(again, torch.float64)
                expected = logits(again)
                cell.merge = difference(logits(again.merge_and_unload(safe_merge=True)), expected)
    except Exception as error:
        cell.failed = f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return cell


def _train(cell: Cell, model: PeftModel) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    reached = set()
    for _ in range(STEPS):
        optimiser.zero_grad()
        model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).loss.backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                cell.finite &= bool(torch.isfinite(parameter.grad).all())
                reached |= {name} if torch.count_nonzero(parameter.grad) else set()
        optimiser.step()
    cell.without_gradient = [name for name in trained if name not in reached]


def reload(model: PreTrainedModel, saved: Path) -> PeftModel:
    """Put a saved adapter on a base by plain PEFT; our own repair of the decoder's bias is made where it is needed."""
    return load_adapter(model, saved)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the two rows, in evaluation mode."""
    return logits_at(model, IDS)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep progress bars and warnings of the libraries out of the way."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def as_record(cell: Cell) -> Mapping[str, Any]:
    """Give a cell as a record."""
    return dict(vars(cell))
