"""The Relax function under construction: parameters, kernels made once, tensors with their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from qcompiler.targets.tvm.emit.dims import Size, axes_of, evaluate, product
from qcompiler.targets.tvm.isa import Isa


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the function.

    Attributes:
        var: Relax's variable.
        sizes: its shape.
        dtype: numpy's name of the type.
        base: what this is a view of, or None.
    """

    var: Any
    sizes: tuple[Size, ...]
    dtype: str
    base: Tensor | None = None


class Builder:
    """Emits one function ``main(inputs, constants)``.

    Args:
        isa: what kernels are made for.
        symbols: names of the open axes.
        tiling: how an 8-bit product of so many input and output features is cut; None: by default.
    """

    def __init__(self, isa: Isa, symbols: Sequence[str], tiling: Callable[[int, int], Any] | None = None) -> None:
        self.isa = isa
        self.tiling = tiling or (lambda in_features, out_features: None)
        self.block = relax.BlockBuilder()
        self.symbols = {name: tirx.Var(name, "int64") for name in symbols}
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.limits: list[tuple[Size, int]] = []
        self._parameters: dict[str, Tensor] = {}
        self._kernels: dict[Any, Any] = {}

    def variable(self, name: str, sizes: Sequence[Size], dtype: str) -> Tensor:
        """A parameter of the function; it must be in its signature."""
        return Tensor(relax.Var(name, self.type(sizes, dtype)), tuple(sizes), dtype)

    def constant(self, name: str, array: npt.NDArray[Any]) -> Tensor:
        """A parameter that holds a constant; the same name is the same constant."""
        if name not in self._parameters:
            array = np.asarray(array, order="C")
            self.constants[name] = array
            self._parameters[name] = self.variable(f"c{len(self._parameters)}", array.shape, _name(array.dtype))
        return self._parameters[name]

    @property
    def parameters(self) -> list[Any]:
        """Relax variables of the constants, in the order of :attr:`constants`."""
        return [tensor.var for tensor in self._parameters.values()]

    def limit(self, size: Size, most: int) -> None:
        """An open size must not be larger than this when the model runs: a table ends there."""
        self.limits.append((size, most))

    def type(self, sizes: Sequence[Size], dtype: str) -> Any:
        """Relax's type."""
        return relax.TensorType(self.shape(sizes), dtype)

    def shape(self, sizes: Sequence[Size]) -> list[Any]:
        """TVM's expressions."""
        return [self.expression(size) for size in sizes]

    def expression(self, size: Size) -> Any:
        """One of them: int64 throughout."""
        value = evaluate(size, self.symbols)
        return tirx.IntImm("int64", value) if isinstance(value, int) else value

    def call(
        self, kernel: Any, inputs: Sequence[Tensor], outputs: Sequence[tuple[Sequence[Size], str]]
    ) -> list[Tensor]:
        """Run a kernel (a frozen dataclass with ``build``); equal kernels are made once."""
        if kernel not in self._kernels:
            name = f"{type(kernel).__name__.lower()}_{len(self._kernels)}"
            self._kernels[kernel] = self.block.add_func(kernel.build(self.isa, name), name)
        types = [self.type(sizes, dtype) for sizes, dtype in outputs]
        arguments = relax.Tuple([tensor.var for tensor in inputs])
        call = relax.call_tir(self._kernels[kernel], arguments, out_ty=types[0] if len(types) == 1 else types)
        made = self.block.emit(call)
        parts = [made] if len(types) == 1 else [self.block.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]
        return [Tensor(var, tuple(sizes), dtype) for var, (sizes, dtype) in zip(parts, outputs, strict=True)]

    def compute(
        self,
        name: str,
        sizes: Sequence[Size],
        dtype: str,
        inputs: Sequence[Tensor],
        body: Callable[..., Any],
        uses: Sequence[Size] = (),
    ) -> Tensor:
        """A tensor expression without a schedule of its own: ``body(inputs, index)`` is one element.

        ``body`` may ask for the :meth:`expression` of its inputs' sizes, of ``sizes`` and of those in ``uses``: within
        it, open axes have variables of the kernel's own.
        """
        seen = [size for tensor in inputs for size in tensor.sizes] + [*sizes, *uses]
        names = sorted({name for size in seen for name in axes_of(size)})

        def define(tensors: Sequence[Any], variables: Sequence[Any]) -> Any:
            outside = self.symbols
            self.symbols = {**outside, **dict(zip(names, variables, strict=True))}
            try:
                return te.compute(self.shape(sizes), lambda *index: body(tensors, index), name=name)
            finally:
                self.symbols = outside

        variables = [self.symbols[name] for name in names]
        var = self.block.emit_te(define, [t.var for t in inputs], variables, primfunc_name_hint=name)
        return Tensor(var, tuple(sizes), dtype)

    def view(self, tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The same numbers in another shape; a view of a view is a view of what lies below, or that itself."""
        if tuple(sizes) == tensor.sizes:
            return tensor
        if tensor.base is not None:
            return self.view(tensor.base, sizes)
        if product(sizes) != product(tensor.sizes):
            raise ValueError(f"{list(tensor.sizes)} does not reshape to {list(sizes)}")
        var = self.block.emit(relax.op.reshape(tensor.var, self.shape(sizes)))
        return Tensor(var, tuple(sizes), tensor.dtype, tensor)

    def rows(self, tensor: Tensor) -> Tensor:
        """[..., n] as [m, n]."""
        return self.view(tensor, (product(tensor.sizes[:-1]), tensor.sizes[-1]))


def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name
