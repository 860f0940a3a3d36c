"""Cross-entropy in few passes: the library's numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peft_mlm import cross_entropy
from peft_mlm.cross_entropy import cross_entropies, losses_and_hits


def some_rows(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = 5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cached_bytes", [1, 8 * 50 * 4, 2**20])
def test_losses_and_gradients_are_the_librarys_however_the_rows_are_cut(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, cached_bytes: int
) -> None:
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", cached_bytes)
    logits, targets = some_rows(13, 50)
    weights = torch.linspace(0.1, 2, 13, dtype=torch.float64)
    losses = cross_entropies(logits, targets, label_smoothing=smoothing)
    expected = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(losses, expected, atol=1e-12, rtol=0)
    (given,) = torch.autograd.grad((losses * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert torch.allclose(given, wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda z: cross_entropies(z, targets, label_smoothing=smoothing), (logits,))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets = some_rows(7, 3000, torch.bfloat16)
    losses = cross_entropies(logits, targets)
    expected = functional.cross_entropy(logits.float(), targets, reduction="none")
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_extreme_logits_give_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    losses = cross_entropies(logits, torch.tensor([0, 0]))
    assert losses.tolist() == [0.0, 2e4]
    losses.sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]))


def test_no_rows_give_no_losses_and_a_gradient_of_no_rows() -> None:
    logits, targets = some_rows(0, 50)
    losses = cross_entropies(logits, targets)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == (0, 50)


def test_hits_are_the_rows_whose_best_token_is_right() -> None:
    logits, targets = some_rows(200, 4)
    losses, hits, _ = losses_and_hits(logits.detach(), targets)
    assert torch.equal(hits, logits.argmax(dim=-1) == targets)
    assert 0 < hits.sum() < 200
    assert torch.allclose(losses, functional.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("cached_bytes", [1, 4 * 12 * 7, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hits_among_the_best_five_are_those_of_a_plain_loop_ties_included(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cached_bytes: int
) -> None:
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", cached_bytes)
    logits, targets = some_rows(300, 12)
    logits = (logits.detach() / 4).round().to(dtype)  # many ties
    _, hits, top_hits = losses_and_hits(logits, targets)
    best, among = [], []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        best.append(row.index(max(row)) == target)
        among.append(sum(one > row[target] for one in row) < 5)
    assert hits.tolist() == best
    assert top_hits.tolist() == among
    assert 10 < sum(best) < sum(among) < 290
    assert len({tuple(row) for row in logits.tolist()}) == 300


def test_a_small_vocabulary_is_among_the_best_five_and_a_row_with_a_nan_has_no_hit() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0], [float("nan")] * 3])
    _, hits, top_hits = losses_and_hits(logits, torch.tensor([0, 1, 0]))
    assert (hits.tolist(), top_hits.tolist()) == ([False] * 3, [True, False, False])
