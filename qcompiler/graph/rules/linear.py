"""Every spelling of a Linear becomes ``MatMul(x, W[in, out])`` with an optional ``Add(bias[out])``, rank kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of, sole_user
from qcompiler.graph.rules.patterns import dims, is_vector, last_dim, made_by, rank, small_array
from qcompiler.graph.rules.rewriter import TIED, Rewriter
from qcompiler.graph.stored import on_disk, transposed


def raise_linears(rewriter: Rewriter) -> None:
    """Rewrite Gemm, Transpose(W), Reshape sandwiches and odd bias shapes; a second walk sees what the first left."""
    for node in rewriter.nodes("Gemm"):
        _gemm(rewriter, node)
    for node in rewriter.nodes("MatMul"):
        _transposed_weight(rewriter, node)
    for node in rewriter.nodes("MatMul"):
        if _weight(node) is not None:
            _bias(rewriter, node)
            _unflatten(rewriter, node)


def _weight(node: ir.Node) -> ir.Value | None:
    """The 2-D initializer that a MatMul has as B, or None."""
    value = node.inputs[1]
    return value if _is_matrix(value) else None


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input() and rank(value) == 2


# --- weights ---


def _transposed_weight(rewriter: Rewriter, node: ir.Node) -> None:
    transpose = made_by(node.inputs[1], "Transpose")
    if transpose is None or not _is_matrix(transpose.inputs[0]):
        return
    if list(transpose.attributes.get_ints("perm", (1, 0))) != [1, 0]:
        return
    source = transpose.inputs[0]
    assert source is not None
    if len(transpose.outputs[0].uses()) > 1:  # one Linear called twice: both read the one transposed copy
        rewriter.bypass(transpose.outputs[0], _transpose(rewriter, source))
    else:
        node.replace_input_with(1, _transpose(rewriter, source))


def _transpose(rewriter: Rewriter, source: ir.Value) -> ir.Value:
    """W transposed: on disk it stays there, and is turned by whoever reads it."""
    others = [user for user, _ in source.uses() if user.op_type != "Transpose"]
    return _derived(rewriter, source, _turned(source), "transpose", shared=bool(others))


def _turned(source: ir.Value) -> ir.TensorProtocol:
    tensor = source.const_value
    assert tensor is not None
    return transposed(tensor) if on_disk(tensor) else ir.tensor(np.ascontiguousarray(tensor.numpy().T))


def _derived(rewriter: Rewriter, source: ir.Value, tensor: ir.TensorProtocol, map_: str, shared: bool) -> ir.Value:
    """A weight made from an initializer, under its name unless something else (a tied embedding) reads the source."""
    name = source.name or "weight"
    if not shared:
        source.metadata_props.setdefault("qcompiler.parameter", name)
        rewriter.rename_initializer(source, f"{name}/source")
    made = rewriter.tensor(name if not shared else f"{name}.tied", tensor, like=source, map_=map_)
    if shared:
        made.metadata_props["qcompiler.parameter"] = name
        made.metadata_props[TIED] = name
    return made


# --- Gemm ---


def _gemm(rewriter: Rewriter, node: ir.Node) -> None:
    """alpha · A' B' + beta · C with a constant B becomes MatMul and Add."""
    a, b = node.inputs[0], node.inputs[1]
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if a is None or b is None or not _is_matrix(b):
        return
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    weight = _gemm_weight(rewriter, node, b, alpha)
    if node.attributes.get_int("transA", 0):
        a = rewriter.insert(node, "Transpose", [a], {"perm": [1, 0]})
    output = node.outputs[0]
    assert weight.shape is not None
    columns = weight.shape[1]
    assert isinstance(columns, int)
    if c is None or beta == 0.0:
        rewriter.replace(output, "MatMul", [a, weight])
        return
    product = rewriter.insert(node, "MatMul", [a, weight], shape=output.shape, name=f"{node.name}/MatMul")
    array = array_of(c)
    if array is not None and array.size in (1, columns) and array.ndim <= 2 and (array.ndim < 2 or array.shape[0] == 1):
        bias = np.broadcast_to(array.reshape(-1) * np.asarray(beta, array.dtype), (columns,))
        exact = beta == 1.0 and array.shape == (columns,)
        c = c if exact else rewriter.initializer(f"{c.name}", bias, like=c if c.is_initializer() else None)
    elif beta != 1.0:
        assert a.dtype is not None
        c = rewriter.insert(node, "Mul", [c, rewriter.constant(np.asarray(beta, a.dtype.numpy()))])
    rewriter.replace(output, "Add", [product, c])


def _gemm_weight(rewriter: Rewriter, node: ir.Node, b: ir.Value, alpha: float) -> ir.Value:
    turned = bool(node.attributes.get_int("transB", 0))
    if not turned and alpha == 1.0:
        return b
    assert b.const_value is not None
    tensor, maps = (_turned(b), ["transpose"]) if turned else (b.const_value, [])
    if alpha != 1.0:
        array = tensor.numpy()
        tensor, maps = ir.tensor(array * np.asarray(alpha, array.dtype)), [*maps, f"scale:{alpha!r}"]
    shared = any(user is not node for user, _ in b.uses())
    return _derived(rewriter, b, tensor, ",".join(maps), shared)


# --- bias ---


def _bias(rewriter: Rewriter, node: ir.Node) -> None:
    """A bias [1, out], [1, 1, out] or one number (with out = 1) becomes [out]."""
    add = sole_user(node.outputs[0])
    weight = _weight(node)
    if add is None or add.op_type != "Add" or add.domain != "" or weight is None:
        return
    index = 1 if add.inputs[0] is node.outputs[0] else 0
    bias, columns = add.inputs[index], last_dim(weight)
    if bias is None or rank(bias) in (None, 1) or columns is None or not is_vector(bias, columns):
        return
    if (rank(node.outputs[0]) or 0) < (rank(bias) or 0):
        return
    array = array_of(bias)
    assert array is not None
    add.replace_input_with(index, rewriter.initializer(bias.name or "bias", array.reshape(-1), like=bias))


# --- Reshape to rank 2 and back (Conv1D, addmm) ---


def _unflatten(rewriter: Rewriter, node: ir.Node) -> None:
    """Reshape(x, [-1, K]) → Linear → Reshape: the Linear moves before the first Reshape.

    MatMul works on the last axis alone, so merging the leading axes before or after it is the same. The Reshape behind
    stays if it does more than restore them.
    """
    weight = _weight(node)
    flat = made_by(node.inputs[0], "Reshape")
    if weight is None or flat is None or weight.shape is None:
        return
    x = flat.inputs[0]
    rows, columns = (int(d) for d in weight.shape.numpy())
    target = small_array(flat.inputs[1])
    if (
        x is None
        or last_dim(x) != rows
        or (rank(x) or 0) < 3
        or target is None
        or target.size != 2
        or target[1] != rows
    ):
        return
    tail, add = node.outputs[0], None
    user = sole_user(tail)
    if user is not None and user.op_type == "Add" and user.domain == "":
        bias = user.inputs[1] if user.inputs[0] is tail else user.inputs[0]
        if is_vector(bias, columns) and rank(bias) == 1:
            add, tail = user, user.outputs[0]
            user = sole_user(tail)
    if user is None or user.op_type != "Reshape" or user.domain != "" or user.inputs[0] is not tail:
        return
    assert x.shape is not None
    shape = ir.Shape([*x.shape[:-1], columns])
    node.replace_input_with(0, x)
    node.outputs[0].shape = shape
    if add is not None:
        add.outputs[0].shape = shape
    if _restores(user, shape):
        rewriter.bypass(user.outputs[0], tail)
    else:  # it copied axes of the flat value by 0: they are others now
        _absolute(rewriter, user)


def _restores(reshape: ir.Node, shape: ir.Shape) -> bool:
    wanted = [d if isinstance(d, int) else d.value for d in shape]
    return dims(reshape.outputs[0]) == wanted and None not in wanted


def _absolute(rewriter: Rewriter, reshape: ir.Node) -> None:
    target = small_array(reshape.inputs[1])
    if target is not None and 0 in target.tolist():
        flat = rewriter.insert(
            reshape,
            "Reshape",
            [reshape.inputs[0], rewriter.constant(np.array([-1, last_dim(reshape.inputs[0])], np.int64))],
        )
        reshape.replace_input_with(0, flat)
