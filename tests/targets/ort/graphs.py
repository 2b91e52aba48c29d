"""Canonical graphs written by hand: a post-LN encoder and a GQA decoder, in float or quantized in three ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import add_initializer
from qcompiler.graph.functions import OPSET, ensure_function, inline_functions
from qcompiler.graph.run import open_session, session_options
from qcompiler.numerics.affine import quantize_weight
from qcompiler.scheme import TensorSpec

WEIGHT = TensorSpec("int8", symmetric=True, granularity="per_channel")
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Weights = Callable[[str, tuple[int, ...]], np.ndarray]


def random_weights(seed: int = 0) -> Weights:
    """Weights by name and shape: vectors about 1 for norms, else small normal numbers."""
    random = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        spread = 0.1 if len(shape) == 1 else 1.0 / np.sqrt(shape[0])
        return (around + spread * random.standard_normal(shape)).astype(np.float32)

    return make


class Graph:
    """A canonical graph under construction.

    Args:
        kind: how Linears are quantized: None (float), "static", "per_tensor" or "per_token".
        weights: where the numbers come from.
        static_range: (min, max) of every static activation.
    """

    def __init__(self, kind: str | None, weights: Weights, static_range: tuple[float, float] = (-6.0, 6.0)) -> None:
        self.model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="test"), ir_version=10)
        self.graph = self.model.graph
        self.kind, self.weights, self.range = kind, weights, static_range
        self.count = 0
        self._quantized: dict[ir.Value, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: list[int | str] | None = None) -> None:
        value.name = name
        value.type = ir.TensorType(FLOAT)
        value.shape = None if shape is None else ir.Shape(shape)
        self.graph.outputs.append(value)

    def constant(self, array: object, name: str | None = None) -> ir.Value:
        self.count += 1
        return add_initializer(self.graph, name or f"c{self.count}", np.asarray(array))

    def op(
        self, op_type: str, *inputs: object, name: str | None = None, outputs: int = 1, **attributes: object
    ) -> ir.Value:
        self.count += 1
        values = [v if isinstance(v, ir.Value) or v is None else self.constant(v) for v in inputs]
        domain = DOMAIN if op_type in _CALLS else ""
        if domain:
            ensure_function(self.model, op_type)
        name = name or f"{op_type}_{self.count}"
        node = ir.node(op_type, values, attributes=attributes, domain=domain, num_outputs=outputs, name=name)  # type: ignore[arg-type]
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}" if outputs > 1 else f"{name}.out"
        self.graph.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, shape: tuple[int, int], bias: bool = True) -> ir.Value:
        """MatMul + Add, or the folded form of a quantized one."""
        array = self.weights(f"{name}.weight", shape)
        if self.kind is None:
            weight, read = self.constant(array, f"{name}.weight"), x
        else:
            integers, scale = quantize_weight(array, WEIGHT, reduce_range=True)  # exact without VNNI too
            zeros = np.zeros(scale.shape, np.int8)
            stored = self.constant(integers, f"{name}.weight_quantized")
            weight = self.op("DequantizeLinear", stored, scale, zeros, axis=1)
            read = self._activation(x)
        y = self.op("MatMul", read, weight, name=name)
        return self.op("Add", y, self.constant(self.weights(f"{name}.bias", shape[1:]), f"{name}.bias")) if bias else y

    def _activation(self, x: ir.Value) -> ir.Value:
        if x not in self._quantized:
            if self.kind == "static":
                low, high = self.range
                scale = np.float32((high - low) / 255)
                self._quantized[x] = self.op("FakeQuant", x, scale, np.uint8(round(-low / scale)), axis=1)
            else:
                self._quantized[x] = self.op(
                    {"per_tensor": "FakeQuantPerTensor"}.get(self.kind or "", "FakeQuantPerToken"), x
                )
        return self._quantized[x]

    def norm(self, x: ir.Value, name: str, size: int) -> ir.Value:
        return self.op(
            "LayerNormalization",
            x,
            self.constant(self.weights(f"{name}.weight", (size,)), f"{name}.weight"),
            self.constant(self.weights(f"{name}.bias", (size,)), f"{name}.bias"),
            axis=-1,
            epsilon=1e-12,
        )

    def split_heads(self, x: ir.Value, count: int, size: int) -> ir.Value:
        return self.op("Transpose", self.op("Reshape", x, np.array([0, 0, count, size])), perm=[0, 2, 1, 3])

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), np.array([0, 0, width]))


_CALLS = {
    "RMSNorm",
    "RotaryEmbedding",
    "Attention",
    "MaskedAttention",
    "FakeQuant",
    "FakeQuantPerTensor",
    "FakeQuantPerToken",
}


def encoder(
    kind: str | None, layers: int = 1, heads: int = 2, size: int = 8, inner: int = 48, weights: Weights | None = None
) -> ir.Model:
    """A post-LN encoder: x [B, S, H·D] and attention_mask [B, S] in, the last hidden state out."""
    g = Graph(kind, weights or random_weights())
    width = heads * size
    x = g.input("x", FLOAT, ["B", "S", width])
    tokens = g.input("attention_mask", INT64, ["B", "S"])
    seen = g.op("Cast", g.op("Unsqueeze", tokens, np.array([1, 2])), to=int(ir.DataType.BOOL))
    mask = g.op("Where", seen, np.float32(0), np.float32(-np.inf))
    for i in range(layers):
        name = f"encoder.layer.{i}"
        q, k, v = (
            g.split_heads(g.linear(x, f"{name}.attention.self.{part}", (width, width)), heads, size)
            for part in ("query", "key", "value")
        )
        y = g.op("MaskedAttention", q, k, v, mask, scale=size**-0.5, name=f"{name}.attention")
        y = g.linear(g.merge_heads(y, width), f"{name}.attention.output.dense", (width, width))
        x = g.norm(g.op("Add", y, x), f"{name}.attention.output.LayerNorm", width)
        y = g.op("Gelu", g.linear(x, f"{name}.intermediate.dense", (width, inner)))
        y = g.linear(y, f"{name}.output.dense", (inner, width))
        x = g.norm(g.op("Add", y, x), f"{name}.output.LayerNorm", width)
    g.output(x, "last_hidden_state", ["B", "S", width])
    return g.model


def decoder(
    kind: str | None,
    layers: int = 1,
    heads: int = 4,
    shared: int = 2,
    size: int = 8,
    inner: int = 48,
    vocabulary: int = 40,
    weights: Weights | None = None,
    theta: float = 10000.0,
    halves_differ: bool = False,
) -> ir.Model:
    """A LLaMA-like decoder: x [B, S, H·D] and attention_mask [B, S] in, logits out; ``shared`` heads of k and v."""
    g = Graph(kind, weights or random_weights())
    width, repeat = heads * size, heads // shared
    x = g.input("x", FLOAT, ["B", "S", width])
    tokens = g.input("attention_mask", INT64, ["B", "S"])
    seen = g.op("Cast", g.op("Unsqueeze", tokens, np.array([1, 2])), to=int(ir.DataType.BOOL))
    positions = g.op("Range", np.int64(0), g.op("Squeeze", g.op("Shape", x, start=1, end=2)), np.int64(1))
    causal = g.op("LessOrEqual", positions, g.op("Unsqueeze", positions, np.array([1])))
    mask = g.op("Where", g.op("And", causal, seen), np.float32(0), np.float32(-np.inf))
    angles = (theta ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    at = g.op("Cast", g.op("Unsqueeze", positions, np.array([0, 2])), to=int(FLOAT))
    half = g.op("Mul", at, angles)
    both = g.op("Concat", half, g.op("Neg", half) if halves_differ else half, axis=-1)
    cos, sin = (g.op("Unsqueeze", g.op(name, both), np.array([1])) for name in ("Cos", "Sin"))

    def repeated(value: ir.Value) -> ir.Value:
        five = g.op("Unsqueeze", value, np.array([2]))
        wide = g.op("Expand", five, np.array([1, 1, repeat, 1, 1]))
        return g.op("Reshape", wide, np.array([0, heads, -1, size]))

    def rms(value: ir.Value, name: str) -> ir.Value:
        weight = g.constant(g.weights(f"{name}.weight", (width,)), f"{name}.weight")
        return g.op("RMSNorm", value, weight, epsilon=1e-5, name=name)

    for i in range(layers):
        name = f"model.layers.{i}"
        h = rms(x, f"{name}.input_layernorm")
        q = g.linear(h, f"{name}.self_attn.q_proj", (width, width), bias=False)
        k, v = (g.linear(h, f"{name}.self_attn.{p}_proj", (width, shared * size), bias=False) for p in "kv")
        q, k = (g.op("RotaryEmbedding", g.split_heads(t, n, size), cos, sin) for t, n in ((q, heads), (k, shared)))
        v = g.split_heads(v, shared, size)
        y = g.op("MaskedAttention", q, repeated(k), repeated(v), mask, scale=size**-0.5, name=f"{name}.attention")
        y = g.linear(g.merge_heads(y, width), f"{name}.self_attn.o_proj", (width, width), bias=False)
        x = g.op("Add", x, y)
        h = rms(x, f"{name}.post_attention_layernorm")
        gate, up = (g.linear(h, f"{name}.mlp.{p}_proj", (width, inner), bias=False) for p in ("gate", "up"))
        y = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        x = g.op("Add", x, g.linear(y, f"{name}.mlp.down_proj", (inner, width), bias=False))
    logits = g.linear(rms(x, "model.norm"), "lm_head", (width, vocabulary), bias=False)
    g.output(logits, "logits", ["B", "S", vocabulary])
    return g.model


def feeds(model: ir.Model, batch: int = 2, length: int = 6, seed: int = 0, padding: int = 2) -> dict[str, np.ndarray]:
    """Random activations, the last sample padded at its end."""
    random = np.random.default_rng(seed)
    width = model.graph.inputs[0].shape[2]  # type: ignore[index]
    mask = np.ones((batch, length), np.int64)
    mask[-1, length - padding :] = 0
    return {"x": random.standard_normal((batch, length, int(width)), np.float32), "attention_mask": mask}  # type: ignore[arg-type]


def run_plain(model: ir.Model, values: dict[str, np.ndarray]) -> np.ndarray:
    """The first output with our functions inlined and ONNX Runtime's optimizer off: what the graph means."""
    copy = model.clone()
    inline_functions(copy)
    options = session_options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(open_session(copy, options).run(None, values)[0])


def run_optimised(model: ir.Model, values: dict[str, np.ndarray]) -> np.ndarray:
    """The first output as a user's session computes it."""
    return np.asarray(open_session(model, session_options(threads=1)).run(None, values)[0])
