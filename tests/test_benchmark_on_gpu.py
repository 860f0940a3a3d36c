"""The benchmark for a GPU goes its way on a CPU, with tiny models, so that it does not fail at its first real use."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.on_gpu import SHAPES, VARIANTS, matmul_peak, measure


@pytest.mark.parametrize(("shape", "nf4"), [("bert", True), ("xlm-roberta", False), ("modernbert", False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_shape_is_trained_in_both_ways_at_the_longest_length(shape: str, nf4: bool, variant: str) -> None:
    assert shape in SHAPES
    figures = measure(shape, variant, 512, 1, nf4=nf4, small=True, device="cpu")
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["tokens_per_second"] > 0
    assert figures["useful_flops"] > 0


def test_the_peak_of_the_matrix_products_is_measured() -> None:
    assert 1e9 < matmul_peak("cpu") < 1e16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_memory_is_measured_too() -> None:
    assert measure("bert", "ours", 128, 1, nf4=True, small=True, device="cuda")["peak_bytes"] > 0
