"""Measure a cost table on this machine: ``python -m qcompiler.targets.ort.measure -o costs.json``.

Each kernel is timed as the lowering builds it, quantization of the activation and bias included, in alternation with
the float MatMul + Add, on one thread, in process CPU time; medians are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import add_initializer, remove_dead
from qcompiler.graph.functions import OPSET, ensure_function
from qcompiler.graph.run import open_session, session_options
from qcompiler.targets.ort.costs import KERNELS, VERSION, Shape
from qcompiler.targets.ort.linears import lower_linears

SHAPES: tuple[Shape, ...] = (
    *(
        (rows, k, n)
        for rows in (1024, 128, 16, 1)
        for k, n in ((384, 384), (384, 1536), (1536, 384), (768, 3072), (2048, 2048))
    ),
)
_FUNCTIONS = {"static": "FakeQuant", "per_tensor": "FakeQuantPerTensor", "per_token": "FakeQuantPerToken"}


def one_linear(rows: int, in_features: int, out_features: int, granularity: str | None, seed: int = 0) -> ir.Model:
    """A canonical model of one Linear with random weights, folded; in float where ``granularity`` is None."""
    random = np.random.default_rng(seed)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, rows, in_features]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="linear")
    model = ir.Model(graph, ir_version=10)
    bias = add_initializer(graph, "bias", random.standard_normal(out_features, np.float32))
    if granularity is None:
        read, weight = (
            x,
            add_initializer(graph, "weight", random.standard_normal((in_features, out_features), np.float32)),
        )
    else:
        read, weight = _activation(model, x, granularity), _folded_weight(graph, random, in_features, out_features)
    product = ir.node("MatMul", [read, weight], name="linear")
    total = ir.node("Add", [product.outputs[0], bias], name="linear.add")
    total.outputs[0].name = "y"
    total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.extend([product, total])
    graph.outputs.append(total.outputs[0])
    return model


def _activation(model: ir.Model, x: ir.Value, granularity: str) -> ir.Value:
    name = _FUNCTIONS[granularity]
    ensure_function(model, name)
    inputs = [x]
    if granularity == "static":
        inputs += [
            add_initializer(model.graph, "x_scale", np.array(0.03, np.float32)),
            add_initializer(model.graph, "x_zero_point", np.array(120, np.uint8)),
        ]
    node = ir.node(name, inputs, domain=DOMAIN, attributes={"axis": 1} if granularity == "static" else None)
    model.graph.append(node)
    return node.outputs[0]


def _folded_weight(graph: ir.Graph, random: np.random.Generator, in_features: int, out_features: int) -> ir.Value:
    integers = random.integers(-64, 65, (in_features, out_features)).astype(np.int8)
    scales = random.uniform(0.5, 1.5, out_features).astype(np.float32) / 1000
    inputs = [
        add_initializer(graph, "weight", integers),
        add_initializer(graph, "weight_scale", scales),
        add_initializer(graph, "weight_zero_point", np.zeros(out_features, np.int8)),
    ]
    node = ir.node("DequantizeLinear", inputs, attributes={"axis": 1})
    graph.append(node)
    return node.outputs[0]


def lowered(shape: Shape, granularity: str, kernel: str) -> ir.Model:
    """:func:`one_linear`, lowered to the kernel of that name."""
    model = one_linear(*shape, granularity)
    lower_linears(model, lambda *_: kernel)
    remove_dead(model)
    return model


def time_alternating(runs: Sequence[Callable[[], Any]], repeat: int, seconds: float = 0.002) -> list[float]:
    """Median µs of process CPU time of each run, in alternation; a timing lasts at least ``seconds``."""
    times: list[list[float]] = [[] for _ in runs]
    inner = []
    for run in runs:
        run()
        start = time.process_time()
        run()
        inner.append(max(1, int(seconds / max(time.process_time() - start, 1e-6))))
    for _ in range(repeat):
        for i, run in enumerate(runs):
            run()  # the one before has left its own data in the caches
            start = time.process_time()
            for _ in range(inner[i]):
                run()
            times[i].append((time.process_time() - start) / inner[i] * 1e6)
    return [statistics.median(t) for t in times]


def measure(shapes: Sequence[Shape] = SHAPES, repeat: int = 11) -> dict[str, Any]:
    """A cost table, JSON-ready, of all kernels at all shapes."""
    names = [(granularity, kernel) for granularity, kernels in KERNELS.items() for kernel in kernels]

    def runs(shape: Shape, feeds: dict[str, Any]) -> list[Callable[[], Any]]:
        models = [one_linear(*shape, None), *(lowered(shape, *name) for name in names)]
        sessions = [open_session(model, session_options(threads=1)) for model in models]
        return [functools.partial(session.run, None, feeds) for session in sessions]

    return tabulate(names, shapes, runs, repeat, {"onnxruntime": ort.__version__})


def tabulate(
    names: Sequence[tuple[str, str]],
    shapes: Sequence[Shape],
    runs: Callable[[Shape, dict[str, Any]], Sequence[Callable[[], Any]]],
    repeat: int,
    machine: Mapping[str, str],
) -> dict[str, Any]:
    """The cost table of a target, JSON-ready.

    Args:
        names: of the kernels, as (granularity, kernel).
        shapes: (rows, in_features, out_features) to measure at.
        runs: what to time at a shape with these feeds: :func:`one_linear` in float, and by each of ``names``.
        repeat: timings of each.
        machine: what runs them, beside the processor.
    """
    floats: list[float] = []
    times: dict[str, list[float]] = {f"{granularity}/{kernel}": [] for granularity, kernel in names}
    for shape in shapes:
        feeds = {"x": np.random.default_rng(1).standard_normal((1, *shape[:2]), np.float32)}
        first, *rest = time_alternating(runs(shape, feeds), repeat)
        floats.append(round(first, 1))
        for column, value in zip(times.values(), rest, strict=True):
            column.append(round(value, 1))
    return {
        "version": VERSION,
        "unit": "microseconds of one thread's CPU time, activation quantization and bias included",
        "machine": {"cpu": _cpu(), **machine},
        "shapes": [list(shape) for shape in shapes],
        "float": floats,
        "kernels": times,
    }


def _cpu() -> str:
    """Vendor, family and model: enough to know the vector unit by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    known = [facts[key] for key in ("model name", "cpu family", "model") if key in facts]
    return ", ".join(known) or platform.machine()


def layout(table: dict[str, Any]) -> str:
    """The table as JSON text with one line for each list of numbers, so that a diff shows what changed."""
    inner = {key: value for key, value in table.items() if key != "kernels"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in inner.items()]
    kernels = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table["kernels"].items()]
    return "\n".join(["{", *lines, ' "kernels": {', ",\n".join(kernels), " }", "}", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m qcompiler.targets.ort.measure", description=__doc__)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("costs.json"), help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=11, help="timings of each kernel; medians are kept (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.output.write_text(layout(measure(repeat=options.repeat)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
