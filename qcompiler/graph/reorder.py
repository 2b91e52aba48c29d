"""Give a basis of channels another order, offline: in the constants at its ends, proved on numbers node by node."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan, ModelError
from qcompiler.graph.basis import Basis
from qcompiler.graph.edit import add_initializer, array_of, unique_name
from qcompiler.graph.shapes import Facts
from qcompiler.graph.stream_ends import conv_behind
from qcompiler.graph.transaction import FoldError, Transaction
from qcompiler.graph.verify import evaluate, fill

Array = npt.NDArray[Any]
Order = npt.NDArray[np.int64]
_SAMPLE = 64  # output features of a reader that are compared


def reorder_basis(model: ir.Model, basis: Basis, order: Order, facts: Facts, *, seed: int = 0) -> FoldPlan:
    """Let channel ``i`` of every member be what channel ``order[i]`` was; the model's outputs stay what they were.

    Weights are written copy-on-write. Behind each member that is an output of the model, a Gather restores the order.

    Args:
        order: a permutation of the channels.
        facts: of :func:`qcompiler.graph.shapes.concrete_shapes`, of this model.
        seed: of the proof's random inputs.

    Raises:
        FoldError: the basis is refused, or the proof fails; nothing is changed.
    """
    if basis.refused:
        raise FoldError(f"the channels of {basis.name!r} cannot be ordered: {basis.refused}")
    if not np.array_equal(np.sort(order), np.arange(basis.channels)):
        raise FoldError(f"no order of the {basis.channels} channels of {basis.name!r}")
    edit = Transaction(model.graph)
    proof = _Proof(model, basis, order, facts, seed)
    axes: dict[tuple[ir.Node, int], set[int]] = {}
    for end in basis.ends:
        along = axes.setdefault((end.node, end.slot), set())
        if end.axis is not None:
            along.add(end.axis)
    writes = [functools.partial(_write, edit, node, slot, along, order) for (node, slot), along in axes.items()]
    writes += [functools.partial(_restore, edit, value, order) for value in basis.outputs]
    error = edit.apply([*writes, proof.ordered], proof)
    sinks = tuple(node.name or "" for node in basis.readers)
    return FoldPlan("reorder", basis.name, sinks, None, proof=error, order=order.astype(np.int32))


def _write(edit: Transaction, node: ir.Node, slot: int, axes: set[int], order: Order) -> None:
    old = array_of(node.inputs[slot])
    if old is None:
        raise ModelError(f"input {slot} of {node.name!r} is not a constant any more")
    if not axes:
        value, named = node.inputs[slot], add_initializer(edit.graph, f"{node.name}.channels", np.argsort(order)[old])
        edit.set_input(node, slot, named)
        if value is not None and value.is_initializer():
            edit.copies[value, b"channels"] = named
        return
    new = functools.reduce(lambda array, axis: np.take(array, order, axis=axis), sorted(axes), old)
    edit.weight(node, slot, new, old, b"%r" % sorted(axes))()


def _restore(edit: Transaction, value: ir.Value, order: Order) -> None:
    """An output of the model in the order that was given; it keeps its name."""
    graph, name = edit.graph, value.name or ""
    indices = add_initializer(graph, f"{name}.order", np.argsort(order))
    node = ir.node("Gather", [value, indices], attributes={"axis": -1}, name=unique_name(graph, f"{name}.restored"))
    restored = node.outputs[0]
    restored.type, restored.shape = value.type, value.shape
    producer = value.producer()
    assert producer is not None
    places = [i for i, output in enumerate(graph.outputs) if output is value]
    graph.insert_after(producer, node)

    def undo() -> None:
        for i in places:
            graph.outputs[i] = value
        restored.name, value.name = None, name
        graph.remove(node, safe=True)

    for i in places:
        graph.outputs[i] = restored
    value.name = unique_name(graph, f"{name}.ordered")
    restored.name = name
    edit.undo.append(undo)


class _Proof:
    """What each node that touches the basis computes, before and after, from members in the order of the time.

    Nodes are evaluated one by one, so that the memory it takes is that of the largest.
    """

    def __init__(self, model: ir.Model, basis: Basis, order: Order, facts: Facts, seed: int) -> None:
        self._model, self._order, self._seed = model, order, seed
        self._after = False
        self._facts = {value: facts.get(value.name or "") for value in basis.members}
        self._others = facts
        self._readers = set(basis.readers)
        made = {value.producer() for value in basis.members}
        read = {node for value in basis.members for node, _ in value.uses()}
        self._steps = [_step(node) for node in model.graph if node in made | read]
        nodes = [node for step in self._steps for node in step]
        self._names = {value: value.name or "" for node in nodes for value in (*node.inputs, *node.outputs) if value}

    def ordered(self) -> None:
        """From now on the graph is the ordered one."""
        self._after = True

    def __call__(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for step in self._steps:
            found.update(self._outputs(step))
        return found

    def _outputs(self, step: list[ir.Node]) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        inside = {value for node in step for value in node.outputs}
        for node in step:
            for slot, value in enumerate(node.inputs):
                if value is not None and value not in inside:
                    array = array_of(value)
                    feeds[value.name or ""] = self._fed(value) if array is None else self._constant(node, slot, array)
        wanted = [value for value in step[-1].outputs if value.uses() or value.is_graph_output()]
        arrays = evaluate(self._model, step, feeds, [value.name or "" for value in wanted])
        found = {}
        for value in wanted:
            array = arrays[value.name or ""]
            if value in self._facts and not self._after:
                array = array[..., self._order]
            found[self._names[value]] = array
        return found

    def _constant(self, node: ir.Node, slot: int, array: Array) -> Array:
        if node in self._readers and slot == 1 and node.outputs[0] not in self._facts:
            array = array[..., :_SAMPLE]
        small = array.dtype.itemsize < 4 and array.dtype.kind not in "iub"
        return array.astype(np.float32) if small else array

    def _fed(self, value: ir.Value) -> Array:
        name = self._names[value]
        fact = self._facts[value] if value in self._facts else self._others.get(name)
        if fact is None:
            raise ModelError(f"the shape of {name!r} is not known")
        array = fill(name, fact, self._seed)
        if fact.dtype.is_floating_point():
            array = array.astype(np.float32)
        return array[..., self._order] if value in self._facts and self._after else array


def _step(node: ir.Node) -> list[ir.Node]:
    """The nodes that are evaluated at once: a convolution with what puts its channels last, else the node alone."""
    step = [node]
    conv = conv_behind(node)
    while conv is not None and step[0] is not conv:
        before = step[0].inputs[0]
        assert before is not None
        producer = before.producer()
        assert producer is not None
        step.insert(0, producer)
    return step
