"""A mixture of experts with folded weights in groups: to one QMoE.

What ONNX Runtime 1.31's CPU kernel computes was found by experiment (``tests/targets/ort/test_qmoe.py``): of a gated
activation it takes SwiGLU only, whose two halves interleave in the rows of its first weight; ``activation_alpha`` 1 and
``activation_beta`` 0 make that silu(gate) · up. ``router_probs`` choose k experts a row and are not what their results
are weighed by where there are ``router_weights``: so what any router chose is written into two tables [rows, experts],
ones and weights, and the router itself stays in the graph.

Experts that do not fit stay one MatMulNBits each (:mod:`qcompiler.targets.ort.nbits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, insert_node, remove_dead
from qcompiler.graph.experts import Projection, parted, projections
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear
from qcompiler.graph.rules.patterns import last_dim
from qcompiler.numerics.packing import pack, pack_weight
from qcompiler.targets.ort.emit import contrib_instead
from qcompiler.targets.ort.mixtures import Mixture, Unfit, mixture_of
from qcompiler.targets.ort.nbits import BLOCK_SIZES, Blocks, blocks_of

_APART = "one product an expert"


@dataclasses.dataclass(frozen=True, eq=False)
class _Packed:
    """One projection as the operator stores it.

    Attributes:
        weight: uint8 [experts, out, bytes].
        scales: float32 [experts, out, blocks], or [experts, out] of one scale an output channel.
        zero_points: packed along the last axis; None where all are the middle of the range.
    """

    weight: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def lower_experts(model: ir.Model) -> tuple[dict[str, str], list[Note]]:
    """Replace every mixture of experts that fits, in place.

    Returns:
        Name of each lowered Linear -> name of the QMoE that computes it; and a note for each expert's Linears.
    """
    nodes: dict[str, str] = {}
    notes: list[Note] = []
    between = "a pass put operators between some experts and their inputs, which QMoE does not compute"
    notes += [Note(line.name, _APART, between) for line in parted(model) if line.weight_quant is not None]
    groups: dict[ir.Node, list[Projection]] = {}
    for projection in projections(model):
        groups.setdefault(projection.sort, []).append(projection)
    for group in groups.values():
        linears = [linear for projection in group for linear in projection.linears]
        if all(_blocks(linear) is None for linear in linears):
            continue
        try:
            name, what = _replace(model, mixture_of(group))
        except Unfit as why:
            notes += [Note(linear.name, _APART, str(why)) for linear in linears]
            continue
        nodes |= {linear.name: name for linear in linears}
        notes += [Note(linear.name, "QMoE", what) for linear in linears]
    if nodes:
        remove_dead(model)
    return nodes, notes


def _blocks(linear: Linear) -> Blocks | None:
    return None if linear.weight_quant is None else blocks_of(linear.weight_quant)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the weights of all experts of a projection are quantized; groups: scales of one output feature."""

    inputs: int
    bits: int
    group_size: int
    groups: int

    @property
    def whole(self) -> bool:
        return self.groups == 1

    def takes(self, size: int) -> bool:
        """Whether blocks of that size fill the inputs, each within one group."""
        return self.inputs % size == 0 and (self.whole or self.group_size % size == 0)


def _each(projection: Projection) -> Iterator[Blocks]:
    """The experts' weights, one at a time: a layer's may be too many for memory.

    Raises:
        Unfit: one is no integers.
    """
    for linear in projection.linears:
        blocks = _blocks(linear)
        if blocks is None:
            raise Unfit("QMoE wants integer weights in all experts")
        yield blocks


def _common(projection: Projection) -> tuple[_Form, int | None]:
    """The form of the experts' weights, and the groups that their inputs are quantized in (None: they are float).

    Raises:
        Unfit: the experts differ.
    """
    forms = {_Form(len(b.q), b.bits, b.group_size, len(b.scale)) for b in _each(projection)}
    quants = [linear.activation_quant for linear in projection.linears]
    if any(quant is not None and not is_call(quant, "FakeQuantPerGroup") for quant in quants):
        raise Unfit("QMoE takes inputs in float, or in int8 by group at run time")
    sizes = {None if quant is None else quant.attributes["block_size"].as_int() for quant in quants}
    if len(forms) > 1 or len(sizes) > 1:
        raise Unfit("QMoE wants the same bits and groups in all experts")
    return forms.pop(), sizes.pop()


def _layout(a: _Form, b: _Form, wanted: int | None) -> int | None:
    """The block size; None: one scale an output channel, without blocks.

    Raises:
        Unfit: the kernel has none such, or would compute something else.
    """
    bits, whole = a.bits, a.whole and b.whole
    if bits != b.bits:
        raise Unfit(f"QMoE wants the same bits in both projections, not {bits} and {b.bits}")
    if wanted is None and bits != 4 and not (whole or (bits == 2 and {a.group_size, b.group_size} == {16})):
        raise Unfit(f"QMoE of {bits} bits in groups rounds its inputs, which were to stay float")
    if wanted is not None and bits == 2:
        raise Unfit("QMoE of 2 bits does not take inputs in int8 by group")
    if wanted is None and whole and bits != 4:
        if (a.inputs * bits) % 8 or (b.inputs * bits) % 8:
            raise Unfit(f"QMoE wants weights of whole bytes, not {a.inputs} and {b.inputs} of {bits} bits")
        return None
    sizes = BLOCK_SIZES if wanted is None else {wanted} & set(BLOCK_SIZES)
    size = max((size for size in sizes if a.takes(size) and b.takes(size)), default=None)
    if size is None:
        groups = wanted or a.group_size
        raise Unfit(f"QMoE has no blocks that divide {a.inputs} and {b.inputs} inputs in groups of {groups}")
    return size


def _replace(model: ir.Model, mixture: Mixture) -> tuple[str, str]:
    """Put the operator in the place of the mixture; its name, and what it is."""
    first, wanted = _common(mixture.first)
    second, also = _common(mixture.second)
    if wanted != also:
        raise Unfit("QMoE wants the inputs of both projections quantized alike")
    if mixture.x.dtype != ir.DataType.FLOAT:
        raise Unfit("QMoE is given float32 here")
    size = _layout(first, second, wanted)
    parts = (
        _packed((_interleaved(blocks, mixture.gate) for blocks in _each(mixture.first)), size),
        _packed(_each(mixture.second), size),
    )
    bits, experts, name = first.bits, len(mixture.first.linears), _name(mixture)
    named = zip(("up", "down"), parts, strict=True)
    constants = [_constants(model.graph, f"{name}.{part}", arrays) for part, arrays in named]
    (w1, s1, z1), (w2, s2, z2) = constants
    probabilities, weights = _tables(model.graph, mixture, experts, name)
    attributes: dict[str, Any] = {
        "k": last_dim(mixture.ids),
        "expert_weight_bits": bits,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 0,
        "accuracy_level": 0 if wanted is None else 4,
        "weights_prepacked": 0,
    }
    if size is not None:
        attributes["block_size"] = size
    inputs = [mixture.x, probabilities, w1, s1, None, w2, s2, None, None, None, None, z1, z2, None, weights]
    node = contrib_instead(model, [mixture.last], "QMoE", inputs, attributes, name)
    how = "float inputs" if wanted is None else "inputs in int8 by block"
    groups = "one scale an output channel" if size is None else f"blocks of {size}"
    return node.name or "", f"{experts} experts of {bits} bits, {groups}, {how}"


def _name(mixture: Mixture) -> str:
    """ "layers.0.mlp.experts" of "layers.0.mlp.experts.0.gate_up_proj"."""
    return f"{mixture.first.linears[0].name.rsplit('.', 2)[0]}.mixture"


def _interleaved(blocks: Blocks, gate: int) -> Blocks:
    """Output features in the order gate 0, up 0, gate 1, up 1 …"""
    halves = np.arange(blocks.q.shape[1]).reshape(2, -1)
    order = halves[[gate, 1 - gate]].T.reshape(-1)
    q, scale, zero_point = (a[:, order] for a in (blocks.q, blocks.scale, blocks.zero_point))
    return dataclasses.replace(blocks, q=q, scale=scale, zero_point=zero_point)


def _packed(experts: Iterable[Blocks], size: int | None) -> _Packed:
    """The experts' weights; ``size`` None: they have one scale an output channel, and rows fill their bytes."""
    weights, scales, zeros = [], [], []
    bits = 0
    for expert in experts:
        bits, (rows, columns) = expert.bits, expert.q.shape
        blocks = expert if size is None else expert.in_blocks_of(size)
        weights.append(pack_weight(blocks.q, bits, size or rows).reshape(columns, -1))
        scales.append(blocks.scale.T if size is not None else blocks.scale[0])
        zeros.append(blocks.zero_point.T if size is not None else blocks.zero_point[0])
    zero_points = np.stack(zeros)
    middle = bool((zero_points == 1 << (bits - 1)).all())  # what the operator takes where none are given
    return _Packed(np.stack(weights), np.stack(scales), None if middle else pack(zero_points.astype(np.uint8), bits))


def _constants(graph: ir.Graph, name: str, part: _Packed) -> list[ir.Value | None]:
    return [
        add_initializer(graph, f"{name}_weights", part.weight),
        add_initializer(graph, f"{name}_scales", part.scales),
        None if part.zero_points is None else add_initializer(graph, f"{name}_zero_points", part.zero_points),
    ]


def _tables(graph: ir.Graph, mixture: Mixture, experts: int, name: str) -> tuple[ir.Value, ir.Value]:
    """[rows, experts]: 1 and the weight where a row chose an expert, 0 elsewhere."""

    def step(op_type: str, inputs: Sequence[ir.Value], what: str, dtype: ir.DataType, **attributes: Any) -> ir.Value:
        made = insert_node(graph, mixture.last, op_type, inputs, attributes=attributes, name=f"{name}.{what}")
        made.outputs[0].type = ir.TensorType(dtype)
        return made.outputs[0]

    ids, real, whole = mixture.ids, ir.DataType.FLOAT, ir.DataType.INT64
    chosen = step("Shape", [ids], "chosen", whole)
    rows = step("Shape", [ids], "rows", whole, start=0, end=1)
    width = add_initializer(graph, f"{name}.width", np.array([experts], np.int64))
    sizes = step("Concat", [rows, width], "sizes", whole, axis=0)
    zeros = step("ConstantOfShape", [sizes], "zeros", real, value=ir.tensor(np.zeros(1, np.float32)))
    ones = step("ConstantOfShape", [chosen], "ones", real, value=ir.tensor(np.ones(1, np.float32)))
    return (
        step("ScatterElements", [zeros, ids, ones], "choice", real, axis=1),
        step("ScatterElements", [zeros, ids, mixture.weights], "weights", real, axis=1),
    )
