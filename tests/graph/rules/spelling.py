"""Graphs in ONNX text form, brought into canonical form and compared with themselves on numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph import canonical
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner

Arrays = Mapping[str, npt.NDArray[Any]]


def spelled(
    body: str, weights: Mapping[str, Sequence[int] | npt.NDArray[Any]] = {}, opset: int = 21, seed: int = 0
) -> ir.Model:
    """The graph of that text; ``weights`` gives each initializer's shape (then random) or its numbers.

    ONNX text has no dots in names: ``fc__weight`` in the text is the initializer ``fc.weight``.
    """
    rng = np.random.default_rng(seed)
    imports = f'["": {opset}, "com.microsoft": 1]'
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {imports}>\n{body}")
    for name, given in weights.items():
        array = given if isinstance(given, np.ndarray) else rng.standard_normal(given).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace(".", "__")))
    model = ir.from_proto(proto)
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").replace("__", ".")
    return model


def raised(model: ir.Model, feeds: Arrays, tolerance: float = 2e-6) -> ir.Model:
    """The canonical form of ``model``, checked, and the same on ``feeds``."""
    before = Runner(model, threads=1)(feeds)
    after = model.clone()
    canonicalise(after)
    canonical.check(after)
    results = Runner(after, threads=1)(feeds)
    assert list(results) == list(before)
    for name, reference in before.items():
        assert results[name].shape == reference.shape
        assert results[name].dtype == reference.dtype
        scale = max(float(np.abs(reference).max(initial=0)), 1e-6)
        assert float(np.abs(results[name] - reference).max(initial=0)) <= tolerance * scale, name
    return after


def counts(model: ir.Model) -> Counter[str]:
    """How many nodes there are of each operator; ours are written with their domain."""
    return Counter(f"{DOMAIN}::{n.op_type}" if n.domain == DOMAIN else n.op_type for n in model.graph)


def normal(*shape: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
