"""What weights should make of inputs that earlier rounding has changed: GPTQ's target, asymmetric in its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.hessian import damped

Array = npt.NDArray[Any]


def corrected(weight: Array, hessian: Array, cross: Array, share: float, damp: float = 0.03) -> npt.NDArray[np.float64]:
    """The float weight that GPTQ is to round, so that X̃ Ŵ comes near X W and not only near X̃ W.

    X̃ are the inputs of the quantized model, X those of the float model (Li et al. 2025, GPTAQ, arXiv 2504.02692,
    equation 7). All of the difference is made up for by W + (X̃ᵀX̃)^-1 X̃ᵀ(X - X̃) W; GPTAQ adds the same terms input by
    input. With few tokens much of that fits chance, so part of it is better than all (the paper's code takes a
    quarter).

    Args:
        weight: [in, out].
        hessian: X̃ᵀX̃ [in, in].
        cross: X̃ᵀ(X - X̃) [in, in].
        share: of the change; 0 leaves the weight as it is.
        damp: of the Hessian, times its mean diagonal.
    """
    weight = np.asarray(weight, np.float64)
    return np.asarray(weight + share * np.linalg.solve(damped(hessian, damp), cross @ weight))
