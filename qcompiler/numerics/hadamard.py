"""Hadamard matrices of many orders, and rotations made of them: orthogonal matrices that spread outliers evenly.

Sylvester's doubling and Paley's two constructions (Paley 1933; Hedayat and Wallis 1978, sections 3 and 4), joined by
Kronecker products, give every width that is common in Transformers. Other widths take a random orthogonal factor.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_LARGEST = 64  # Sylvester factors are split to at most this: a Kronecker product is applied factor by factor


def hadamard(order: int) -> Matrix | None:
    """A matrix H of ±1 with H Hᵀ = order · I; float64 [order, order]; None where no construction here gives one."""
    factors = _factors(order)
    if factors is None:
        return None
    whole: npt.NDArray[Any] = np.ones((1, 1))
    for factor in factors:
        whole = np.kron(whole, factor)
    return whole


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal matrix Q = diag(signs) · (F1 ⊗ F2 ⊗ …), applied without being made.

    Attributes:
        signs: float64 [size] of ±1.
        factors: orthogonal float64 matrices whose orders multiply to size.
        exact: whether all factors are Hadamard matrices: every element of Q then is ±1/sqrt(size).
    """

    signs: npt.NDArray[np.float64]
    factors: tuple[Matrix, ...]
    exact: bool

    @property
    def size(self) -> int:
        return len(self.signs)

    def __call__(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """x Q along the last axis of x [..., size]; float64, or float32 where x is. (Qᵀ W is ``self(W.T).T``.)"""
        dtype = np.float32 if x.dtype == np.float32 else np.float64
        y = (x * self.signs.astype(dtype)).reshape(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            y = np.moveaxis(np.moveaxis(y, axis, -1) @ factor.astype(dtype), -1, axis)
        return y.reshape(x.shape)

    def matrix(self) -> Matrix:
        """Q itself, float64 [size, size]."""
        return self(np.eye(self.size))


def make_rotation(size: int, seed: int = 0, random_signs: bool = True) -> Rotation:
    """A randomised Hadamard rotation (QuaRot, Ashkboos et al. 2024, section 3), or the next best thing.

    Where no Hadamard matrix of that order is known here, the largest power of two in ``size`` keeps its Hadamard matrix
    and the odd rest gets a random orthogonal one, from the QR decomposition of a normal matrix (Stewart 1980).

    Args:
        random_signs: False leaves the signs at +1: all channels then add up in the first one.
    """
    rng = np.random.default_rng([seed, size])
    signs = rng.choice([-1.0, 1.0], size) if random_signs else np.ones(size)
    factors = _factors(size)
    if factors is not None:
        return Rotation(signs, tuple(_orthogonal(factor) for factor in factors), True)
    twos = size & -size
    q, r = np.linalg.qr(rng.standard_normal((size // twos, size // twos)))
    hadamards = _factors(twos) or ()
    return Rotation(signs, (q * np.sign(np.diag(r)), *(_orthogonal(factor) for factor in hadamards)), False)


def _orthogonal(factor: Matrix) -> Matrix:
    return factor / math.sqrt(len(factor))


def _factors(order: int) -> tuple[Matrix, ...] | None:
    """Hadamard matrices whose Kronecker product has that order: the smallest of Paley's, then Sylvester's."""
    if order < 1:
        return None
    twos = order & -order
    odd = order // twos
    if odd == 1:
        return _sylvester(order)
    for twice in range(2, twos.bit_length()):
        base = _paley(odd << twice)
        if base is not None:
            return base, *_sylvester(twos >> twice)
    return None


def _sylvester(order: int) -> tuple[Matrix, ...]:
    factors: list[Matrix] = []
    while order > 1:
        size = min(order, _LARGEST)
        doubled = np.ones((1, 1))
        while len(doubled) < size:
            doubled = np.kron(doubled, np.array([[1.0, 1.0], [1.0, -1.0]]))
        factors.append(doubled)
        order //= size
    return tuple(factors)


def _paley(order: int) -> Matrix | None:
    """Paley's first construction, order = q + 1 with q = 3 mod 4, or his second, order = 2 (q + 1) with q = 1 mod 4.

    Only primes q are tried, no higher powers of primes.
    """
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return np.eye(order) + _conference(q, -1.0)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _conference(q, 1.0)
        return np.kron(conference, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _conference(q: int, sign: float) -> Matrix:
    """The conference matrix of order q + 1 over the residues of the prime q; ``sign`` +1: symmetric, -1: skew."""
    squares = np.unique(np.arange(1, q) ** 2 % q)
    character = np.full(q, -1.0)
    character[squares] = 1
    character[0] = 0
    jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    conference = np.zeros((q + 1, q + 1))
    conference[0, 1:] = 1
    conference[1:, 0] = sign
    conference[1:, 1:] = jacobsthal
    return conference


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
