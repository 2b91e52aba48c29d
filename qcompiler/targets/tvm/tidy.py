"""Fewer instructions for TVM's virtual machine: a call of its builtins costs as much as a small kernel's row.

A graph of 60 kernels came to 1,200 of them: the shape and the tensor of every buffer made anew each time, and the types
of all constants checked on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
BUFFERS = ("relax.memory.alloc_tensor", "relax.reshape")
SHAPES = ("vm.builtin.make_shape",)


@tvm.transform.module_pass(opt_level=0, name="Share")
class Share:
    """Calls of the same arguments are made once.

    What a storage holds is planned already: two tensors of one shape on one storage never live at once. Tensors and
    views are to be shared before :class:`relax.transform.KillAfterLastUse`.

    Args:
        operators: names of pure operators or packed functions.
    """

    def __init__(self, *operators: str) -> None:
        self.operators = operators

    def transform_module(self, module: Any, _: Any) -> Any:
        """The pass."""
        return _with_main(module, _Sharing(self.operators).function(module["main"]))


@tvm.transform.module_pass(opt_level=0, name="TrustConstants")
class TrustConstants:
    """No check of the parameters behind the function's ``num_input``: they are ours, and kernels check them as well."""

    def transform_module(self, module: Any, _: Any) -> Any:
        """The pass."""
        main = module["main"]
        constants = set(main.params[int(main.attrs["num_input"]) :])

        def kept(binding: Any) -> bool:
            value = binding.value
            return not (_called(value) in CHECKS and value.args[0] in constants)

        blocks = [relax.BindingBlock([b for b in block.bindings if kept(b)]) for block in main.body.blocks]
        return _with_main(module, _function(main, blocks, main.body.body))


class _Sharing:
    def __init__(self, operators: Sequence[str]) -> None:
        self.operators = operators
        self.first: dict[Any, Any] = {}
        self.known: dict[tuple[str, int], list[tuple[Any, Any]]] = {}

    def function(self, main: Any) -> Any:
        """Without what was computed before; its readers get the first result."""
        blocks, result = [], main.body.body
        for block in main.body.blocks:
            bindings = []
            for binding in block.bindings:
                var, value = binding.var, self._replaced(binding.value)
                earlier = self._earlier(value, var)
                if earlier is not None:
                    self.first[var] = earlier
                elif isinstance(value, relax.Tuple) and not var.same_as(result):
                    self.first[var] = value  # of a kernel with several outputs: only its fields are read
                else:
                    bindings.append(relax.VarBinding(var, value))
            blocks.append(relax.BindingBlock(bindings))
        return _function(main, blocks, self._replaced(result))

    def _earlier(self, value: Any, var: Any) -> Any:
        if isinstance(value, relax.Var):
            return value
        if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Tuple):
            return value.tuple_value.fields[value.index]
        if _called(value) not in self.operators:
            return None
        key = relax.Tuple(value.args)  # of the call itself, one that was rewritten lacks its type
        alike = self.known.setdefault((_called(value), tvm_ffi.structural_hash(key)), [])
        for other, holder in alike:
            if tvm_ffi.structural_equal(key, other):
                return holder
        alike.append((key, var))
        return None

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, relax.Var):
            return self.first.get(value, value)
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self._replaced(value.tuple_value), value.index)
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._replaced(field) for field in value.fields])
        if isinstance(value, relax.Call) and any(self._replaced(argument) is not argument for argument in value.args):
            arguments = [self._replaced(argument) for argument in value.args]
            return relax.Call(value.op, arguments, value.attrs, value.ty_args)
        return value


def _called(value: Any) -> str:
    """The operator or packed function that is called; "" for anything else."""
    if not isinstance(value, relax.Call):
        return ""
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return str(value.op.name) if isinstance(value.op, tvm.ir.Op) else ""


def _function(like: Any, blocks: Any, result: Any) -> Any:
    return relax.Function(like.params, relax.SeqExpr(blocks, result), like.ret_ty, like.is_pure, like.attrs)


def _with_main(module: Any, main: Any) -> Any:
    module = tvm.IRModule(module.functions, attrs=module.attrs)
    module["main"] = main
    return module
