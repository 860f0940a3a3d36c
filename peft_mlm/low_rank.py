"""Matrices as products of two thin factors: joined, measured, and cut to a rank with the lost part told.

A change of a weight by LoRA is b @ a, of rank r. Sums of such products are again one, of the ranks' sum. The best
approximation of a lower rank is the truncated singular value decomposition (Eckart and Young 1936,
https://doi.org/10.1007/BF02288367). For a product it is found without the whole matrix: with b = Q R and aᵀ = P S, the
singular values of b @ a are those of the small matrix R Sᵀ. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# What is lost below this share is rounding of the float32 numbers that were summed.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Factors:
    """A matrix b @ a.

    Attributes:
        a: (r, n), float64.
        b: (m, r), float64.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Length of the inner dimension; the matrix itself may be of a lower rank."""
        return len(self.a)

    @property
    def largest_rank(self) -> int:
        """The highest rank that a matrix of this shape can have."""
        return min(len(self.b), self.a.shape[1])

    def dense(self) -> torch.Tensor:
        """Multiply out: (m, n), float64."""
        return self.b @ self.a


@dataclass(frozen=True)
class Loss:
    """What an approximation left out.

    Attributes:
        lost: Frobenius norm of the difference.
        whole: Frobenius norm of what was approximated.
    """

    lost: float
    whole: float

    @property
    def share(self) -> float:
        """The relative Frobenius error; 0 where there was nothing."""
        return self.lost / self.whole if self.whole else 0.0


def add_losses(losses: Iterable[Loss]) -> Loss:
    """Give the loss over several matrices as if they were one.

    Args:
        losses: One for each.

    Returns:
        Roots of the sums of squares.
    """
    pairs = [(loss.lost, loss.whole) for loss in losses]
    return Loss(math.hypot(*(lost for lost, _ in pairs)), math.hypot(*(whole for _, whole in pairs)))


def join(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """Sum products exactly: Σ w b @ a is one product, with the factors side by side.

    Args:
        terms: Weight and factors of each; all of one shape (m, n).

    Returns:
        Factors of the ranks' sum.
    """
    return Factors(
        torch.cat([factors.a for _, factors in terms], dim=0),
        torch.cat([weight * factors.b for weight, factors in terms], dim=1),
    )


def truncate(factors: Factors, rank: int | None) -> tuple[Factors, Loss]:
    """Find the best approximation of a product by one of a lower rank.

    Args:
        factors: The product.
        rank: The rank to keep; None for the smallest that loses nothing but rounding.

    Returns:
        The approximation, its singular values spread evenly over both factors, and what it leaves out.
    """
    left, upper = torch.linalg.qr(factors.b)
    right, lower = torch.linalg.qr(factors.a.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    # terms that cancel leave the rounding of float64
    s = torch.where(s > len(s) * torch.finfo(s.dtype).eps * upper.norm() * lower.norm(), s, 0.0)
    kept, loss = _cut(s, rank)
    root = s[:kept].sqrt()
    return Factors(root.unsqueeze(1) * (vh[:kept] @ right.T), (left @ u[:, :kept]) * root), loss


def truncate_dense(matrix: torch.Tensor, rank: int | None) -> tuple[Factors, Loss]:
    """Find the best approximation of a matrix by a product of thin factors.

    Args:
        matrix: (m, n), any float type.
        rank: The rank to keep; None for the smallest that loses nothing but rounding.

    Returns:
        The approximation and what it leaves out.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept, loss = _cut(s, rank)
    root = s[:kept].sqrt()
    return Factors(root.unsqueeze(1) * vh[:kept], u[:, :kept] * root), loss


def _cut(singular_values: torch.Tensor, rank: int | None) -> tuple[int, Loss]:
    """Say how many singular values are kept, and the norm of the others."""
    whole = float(singular_values.norm())
    # norm of what is left out when 0, 1, 2, ... values are kept
    tails = [*singular_values.square().flip(0).cumsum(0).flip(0).sqrt().tolist(), 0.0]
    if rank is None:
        rank = next(kept for kept, tail in enumerate(tails) if tail <= ROUNDING * whole)
    kept = max(1, min(rank, len(singular_values)))
    return kept, Loss(tails[kept], whole)
