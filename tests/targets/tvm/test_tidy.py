"""What TVM's virtual machine has to do besides the kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

import tvm
from tvm import relax

from qcompiler.graph.rules import canonicalise
from qcompiler.targets.tvm.emit.graph import emit
from qcompiler.targets.tvm.isa import detect
from qcompiler.targets.tvm.lowering import compile_module

LAYERS = 6
NODES = "\n".join(f"h{i} = MatMul(x{i}, w{i})\n g{i} = Relu(h{i})\n x{i + 1} = Softmax(g{i})" for i in range(LAYERS))
TEXT = f"""<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 16] x0) => (float[n, 16] x{LAYERS}) {{ {NODES} }}"""


def test_buffers_are_shared_and_constants_trusted() -> None:
    """A chain of layers needs two or three buffers, whatever its length; and only its input is checked."""
    model, rng = ir.from_onnx_text(TEXT), np.random.default_rng(0)
    weights = [rng.standard_normal((16, 16)).astype(np.float32) for _ in range(LAYERS)]
    for i, weight in enumerate(weights):
        value = next(node for node in model.graph if f"w{i}" in [v.name for v in node.inputs]).inputs[1]
        assert value is not None
        value.const_value = ir.tensor(weight)
        value.shape, value.dtype = ir.Shape(weight.shape), ir.DataType.FLOAT
        model.graph.register_initializer(value)
    canonicalise(model)
    emitted = emit(model, detect())
    executable = relax.VirtualMachine(compile_module(emitted.module, detect()), tvm.cpu())
    x = rng.standard_normal((5, 16)).astype(np.float32)
    arguments = [tvm.runtime.tensor(array) for array in (x, *emitted.constants.values())]
    calls: Counter[str] = Counter()

    def count(_: Any, name: str, before: bool, *__: Any) -> None:
        calls[name] += before

    executable.set_instrument(count)
    (y,) = executable["main"](*arguments)
    for weight in weights:
        x = np.exp(np.maximum(x @ weight, 0))
        x /= x.sum(1, keepdims=True)
    np.testing.assert_allclose(y.numpy(), x, atol=1e-6)
    assert sum(n for name, n in calls.items() if not name.startswith("vm.")) >= 2 * LAYERS
    assert calls["vm.builtin.alloc_tensor"] <= 4
    assert calls["vm.builtin.make_shape"] <= 6
    assert calls["vm.builtin.check_tensor_info"] == 1
