"""The Hessian of a Linear's squared output error, XᵀX, as GPTQ uses it (Frantar et al. 2023, section 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError

Array = npt.NDArray[Any]

_LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def hessian_error(weight: Array, approximation: Array, hessian: Array) -> npt.NDArray[np.float64]:
    """(w - ŵ)ᵀ H (w - ŵ) of each output channel; arrays [in, out], float64 [out]."""
    difference = np.asarray(weight, np.float64) - approximation
    return np.einsum("kn,kn->n", difference, hessian @ difference)


def damped(hessian: Array, damp: float) -> npt.NDArray[np.float64]:
    """H + damp · mean(diag H) · I; the diagonal of inputs that never fired (0) becomes the mean first."""
    result = np.array(hessian, np.float64)
    diagonal = np.diag(hessian)
    mean = float(diagonal[diagonal > 0].mean()) if (diagonal > 0).any() else 1.0
    result[np.diag_indices_from(result)] = np.where(diagonal > 0, diagonal, mean) + damp * mean
    return result


def inverse_root(hessian: Array, damp: float) -> tuple[npt.NDArray[np.float64], float]:
    """U, upper triangular, with UᵀU = (H + d · mean(diag H) · I)^-1, and the d that it took: ``damp`` at least.

    Inputs that never fired (a diagonal of 0) count as being of mean size and on their own.

    Raises:
        DataError: no damping up to ten times the mean diagonal makes the matrix positive definite.
    """
    for used in (damp, *(step for step in _LADDER if step > damp)):
        try:
            # H = R Rᵀ with R upper triangular is the Cholesky factorisation of H read backwards, and U = R^-1.
            root = np.linalg.cholesky(damped(hessian, used)[::-1, ::-1])[::-1, ::-1]
            upper = _inverse_of_upper(root)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(upper).all():
            return upper, used
    raise DataError(f"the Hessian is not positive definite, whatever the damping (tried up to {_LADDER[-1]:g}).")


def _inverse_of_upper(root: Array) -> Array:
    """The inverse of an upper triangular matrix, by halves: products do the work, a sixth of a general inverse's."""
    half = len(root) // 2
    if half < 32:
        return np.triu(np.linalg.inv(root))
    inverse = np.zeros_like(root)
    first, last = (_inverse_of_upper(root[part, part]) for part in (slice(half), slice(half, None)))
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ root[:half, half:]) @ last
    return inverse
