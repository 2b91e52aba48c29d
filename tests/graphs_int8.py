"""Small canonical graphs, float and quantized, written in ONNX's text form: what ``fold`` leaves for a target."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer
from qcompiler.graph.functions import ensure_function

K, N = 16, 24
_HEADER = '<ir_version: 10, opset_import: ["" : 21, "qcompiler" : 1]>'


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Float weights of two Linears K -> N -> K with ReLU between, and their biases."""
    r = rng(seed)
    return {
        "fc1.weight": r.normal(0, 0.2, (K, N)).astype(np.float32),
        "fc1.bias": r.normal(0, 0.1, N).astype(np.float32),
        "fc2.weight": r.normal(0, 0.2, (N, K)).astype(np.float32),
        "fc2.bias": r.normal(0, 0.1, K).astype(np.float32),
    }


def float_mlp(seed: int = 0) -> ir.Model:
    """x [batch, sequence, K] -> fc1 -> Relu -> fc2 -> y [batch, sequence, K]."""
    text = f"""{_HEADER} g (float[batch, sequence, {K}] x, int64[batch, sequence] attention_mask)
    => (float[batch, sequence, {K}] y) {{
        h0 = MatMul(x, w1)
        h1 = Add(h0, b1)
        h2 = Relu(h1)
        h3 = MatMul(h2, w2)
        y = Add(h3, b2)
    }}"""
    return _finish(text, {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}, weights(seed))


def quantized_mlp(activation: str = "FakeQuant", seed: int = 0) -> ir.Model:
    """The same with int8 weights and fake-quantized inputs, as ``fold`` leaves it.

    ``activation``: "FakeQuant" (static uint8), "FakeQuantPerToken", "FakeQuantPerTensor".
    """
    static = activation == "FakeQuant"
    one = "FakeQuant<axis = 1>(x, sx, zx)" if static else f"{activation}(x)"
    two = "FakeQuant<axis = 1>(h2, sh, zh)" if static else f"{activation}(h2)"
    text = f"""{_HEADER} g (float[batch, sequence, {K}] x, int64[batch, sequence] attention_mask)
    => (float[batch, sequence, {K}] y) {{
        xq = qcompiler.{one}
        w1d = DequantizeLinear<axis = 1>(w1, s1, z1)
        h0 = MatMul(xq, w1d)
        h1 = Add(h0, b1)
        h2 = Relu(h1)
        hq = qcompiler.{two}
        w2d = DequantizeLinear<axis = 1>(w2, s2, z2)
        h3 = MatMul(hq, w2d)
        y = Add(h3, b2)
    }}"""
    arrays = weights(seed)
    for layer, letter in (("fc1", "1"), ("fc2", "2")):
        weight = arrays.pop(f"{layer}.weight")
        scale = (np.abs(weight).max(axis=0) / 64).astype(np.float32)  # 7 bits: exact on machines without VNNI too
        arrays[f"{layer}.weight_quantized"] = np.rint(weight / scale).astype(np.int8)
        arrays[f"s{letter}"] = scale
        arrays[f"z{letter}"] = np.zeros(scale.shape, np.int8)
    if static:
        arrays |= {"sx": np.float32(8 / 255), "zx": np.uint8(128), "sh": np.float32(4 / 255), "zh": np.uint8(3)}
    renamed = {"w1": "fc1.weight_quantized", "b1": "fc1.bias", "w2": "fc2.weight_quantized", "b2": "fc2.bias"}
    return _finish(text, renamed, arrays, (activation,))


def feeds(batch: int = 2, sequence: int = 5, seed: int = 1, padded: bool = False) -> dict[str, np.ndarray]:
    mask = np.ones((batch, sequence), np.int64)
    if padded:
        mask[:, sequence // 2 :] = 0
    return {"x": rng(seed).normal(0, 1, (batch, sequence, K)).astype(np.float32), "attention_mask": mask}


def _finish(
    text: str, renamed: dict[str, str], arrays: dict[str, np.ndarray], functions: tuple[str, ...] = ()
) -> ir.Model:
    """Parse, register the arrays as initializers under their names and let the nodes read them; name the Linears."""
    short = {name: key for key, name in renamed.items()}
    declared = ", ".join(
        f"{_TYPES[array.dtype.name]}[{','.join(map(str, array.shape))}] {short.get(name, name)}"
        for name, array in arrays.items()
    )
    text = text.replace(")\n    =>", f", {declared})\n    =>")
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, array in arrays.items():
        value = next(v for v in model.graph.inputs if v.name == short.get(name, name))
        model.graph.inputs.remove(value)
        ir.convenience.replace_all_uses_with(value, add_initializer(model.graph, name, np.asarray(array)))
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.op_type == "MatMul":
            node.name = "fc1" if "w1" in (node.inputs[1].name or "") or "fc1" in (node.inputs[1].name or "") else "fc2"
    for name in functions:
        ensure_function(model, name)
    return model


_TYPES = {"float32": "float", "int8": "int8", "uint8": "uint8", "int64": "int64"}
