"""Measure a cost table of target tvm-llvm on this machine: ``python -m qcompiler.targets.tvm.measure -o costs.json``.

One Linear at 1024 rows, compiled and run as a whole model is: activation quantization and bias included, in alternation
with the float product, on one thread, in process CPU time; medians are kept. With ``--cpu``, of code for another
processor that runs here, e.g. ``--cpu znver3`` for one without VNNI.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompiler.targets.ort import measure as ort_measure
from qcompiler.targets.ort.costs import Shape
from qcompiler.targets.tvm.costs import KERNELS

SHAPES: tuple[Shape, ...] = tuple(shape for shape in ort_measure.SHAPES if shape[0] == 1024)


def measure(shapes: Sequence[Shape] = SHAPES, repeat: int = 11, cpu: str | None = None) -> dict[str, Any]:
    """A cost table, JSON-ready.

    Raises:
        TargetError: LLVM does not know ``cpu``.
    """
    import tvm

    from qcompiler.targets.tvm.emit.graph import emit
    from qcompiler.targets.tvm.engine import build
    from qcompiler.targets.tvm.isa import detect

    isa = detect(cpu)

    def run(model: Any, feeds: dict[str, Any]) -> Callable[[], Any]:
        return functools.partial(build(model, emit(model, isa)).run, feeds, 1)

    def runs(shape: Shape, feeds: dict[str, Any]) -> list[Callable[[], Any]]:
        granularities = [None, *(granularity for granularity, _ in names)]
        return [run(ort_measure.one_linear(*shape, granularity), feeds) for granularity in granularities]

    names = [(granularity, kernel) for granularity, kernels in KERNELS.items() for kernel in kernels]
    return ort_measure.tabulate(names, shapes, runs, repeat, {"compiled for": isa.cpu, "tvm": tvm.__version__})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m qcompiler.targets.tvm.measure", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("costs.json"), help="where (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=11, help="timings of each kernel (default: %(default)s)")
    parser.add_argument("--cpu", help="LLVM's name of the processor to compile for (default: this one)")
    options = parser.parse_args(arguments)
    os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM is imported
    table = measure(repeat=options.repeat, cpu=options.cpu)
    options.output.write_text(ort_measure.layout(table))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
