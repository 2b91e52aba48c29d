"""GPTQ beside what it stands for: Optimal Brain Surgeon in the same order, and greedy OBQ, on Linears of MiniLM.

usage: obq.py [--outputs 16]

OBQ (Frantar and Alistarh 2022, algorithm 3) rounds, in each output channel by itself, the weight that costs least next,
and updates the whole inverse Hessian each time. Hessians are those of the float inputs on 128 sentences of STS-B dev;
symmetric 4-bit groups of 32, damping .01.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

from qcompiler.calibration import collect
from qcompiler.core import StatRequest
from qcompiler.frontends import open_source
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import Grid, weight_grid
from qcompiler.numerics.hessian import hessian_error
from qcompiler.presets import resolve

Double = npt.NDArray[np.float64]
DAMP = 0.01


def obs(weight: Double, hessian: Double, grid: Grid, order: npt.NDArray[np.intp] | None = None) -> Double:
    """Round a weight [in, out] input by input with explicit updates of the inverse Hessian; the values it becomes.

    Args:
        order: of the inputs; None: the one of least cost next, output by output (OBQ).
    """
    damped = hessian + DAMP * np.diag(hessian).mean() * np.eye(len(hessian))
    first = np.linalg.inv(damped)
    scale, zero_point = grid.in_double().spread(len(weight))
    result = np.empty_like(weight)
    for output in range(weight.shape[1]):
        w, s, z, inverse = weight[:, output].copy(), scale[:, output], zero_point[:, output], first.copy()
        left = np.ones(len(w), bool)
        for step in range(len(w)):
            rounded = (np.clip(np.rint(w / s) + z, grid.low, grid.high) - z) * s
            cost = np.where(left, (w - rounded) ** 2 / np.where(left, np.diag(inverse), 1), np.inf)
            k = int(np.argmin(cost)) if order is None else int(order[step])
            result[k, output], left[k] = rounded[k], False
            w -= inverse[:, k] * (w[k] - rounded[k]) / inverse[k, k]
            inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return result


def main() -> None:
    from protocol import MODELS, encode, minilm_calibration, print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=16, help="output channels of each Linear (default: %(default)s)")
    outputs = parser.parse_args().outputs
    folder = MODELS / "minilm"
    source = open_source(folder)
    canonicalise(source.model)
    chosen = [linear for linear in linears(source.model) if linear.in_features <= 384][:6]
    wanted = {linear.name: StatRequest(linear.x.name or "", "hessian", -1) for linear in chosen}
    stats = collect(source.model, encode(folder, minilm_calibration()), wanted.values(), progress=False)
    rows: dict[str, dict[str, float]] = {}
    for linear in chosen:
        array = array_of(linear.weight)
        assert array is not None
        weight, hessian = array[:, :outputs].astype(np.float64), stats[wanted[linear.name]]
        grid = weight_grid(array[:, :outputs], resolve("w4a8").weight)
        order = np.argsort(-np.diag(hessian), kind="stable")
        solved = gptq(weight, hessian, grid, damp=DAMP, dtype=np.float64, keep_nearest=False)
        values = grid.in_double().dequantized(solved.q)
        explicit, greedy = obs(weight, hessian, grid, order), obs(weight, hessian, grid)
        error, least = float(solved.error.sum()), float(hessian_error(weight, greedy, hessian).sum())
        rows[linear.name] = {
            "difference": float(np.abs(values - explicit).max()),
            "greedy": error / least,
            "nearest": error / float(solved.nearest_error.sum()),
        }
    columns = {
        "difference": ("max |GPTQ - explicit OBS|", "{:.1e}"),
        "greedy": ("error / greedy OBQ's", "{:.3f}"),
        "nearest": ("error / rounding to nearest's", "{:.3f}"),
    }
    print_table(f"GPTQ, float64, act_order, {outputs} output channels", columns, rows)


if __name__ == "__main__":
    main()
