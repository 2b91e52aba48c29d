"""What a target can run and how fast, as data: the passes' only view of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

from qcompiler.core import TargetError


class Quantization(Protocol):
    """What a kernel asks of a tensor's spec (``scheme.TensorSpec`` is one)."""

    @property
    def dtype(self) -> str: ...
    @property
    def granularity(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def group_size(self) -> int | None: ...


Times = tuple[tuple[int, int, float], ...]
"""(in_features, out_features, microseconds) of the Linears that were measured."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way in which a target runs a quantized Linear.

    Attributes:
        name: the operator's name, e.g. "MatMulIntegerToFloat".
        weight_dtype, weight_granularity: what it takes as weight ("int8", "per_channel").
        activation_dtype, activation_granularity, dynamic: what it takes as input ("uint8", "per_tensor", False); of a
            weight-only kernel "float" and "".
        speed: against the target's float32 MatMul, on the machine of the cost table (higher is faster); None: not in
            the table, because there is nothing to choose from.
        group_sizes: of the weights and activations that it takes in groups.
        times: what it takes for as many rows (tokens) as the target is tuned for; empty: it was not measured.
    """

    name: str
    weight_dtype: str
    weight_granularity: str
    activation_dtype: str
    activation_granularity: str
    dynamic: bool
    speed: float | None
    group_sizes: tuple[int, ...] = ()
    times: Times = ()

    def runs(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether it takes a weight and an input quantized so; activation None: an input in float."""
        read = ("float", "", False)
        if activation is not None:
            read = (activation.dtype, activation.granularity, activation.dynamic)
        sizes = {spec.group_size for spec in (weight, activation) if spec is not None} - {None}
        return (
            (self.weight_dtype, self.weight_granularity) == (weight.dtype, weight.granularity)
            and (self.activation_dtype, self.activation_granularity, self.dynamic) == read
            and sizes <= set(self.group_sizes)
        )


@dataclasses.dataclass(frozen=True)
class Capability:
    """What a target can run, as data: handed to passes, which never import a target.

    Attributes:
        target: the target's name.
        kernels: the quantized Linears it has.
        reduce_range: True where u8 x s8 products saturate in 16 bits (x86 without VNNI): weights then keep 7 bits.
        float_times: what its float32 MatMul takes, as ``Kernel.times``.
        fixed_graph: True where the source's own operators are all there can be: transforms fold, and insert nothing.
        embeddings: dtypes of embedding tables in groups that it gathers rows of -> the group sizes that it takes.
    """

    target: str
    kernels: tuple[Kernel, ...]
    reduce_range: bool = False
    float_times: Times = ()
    fixed_graph: bool = False
    embeddings: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def runs(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether any kernel takes a weight and an input quantized so; activation None: an input in float."""
        return any(kernel.runs(weight, activation) for kernel in self.kernels)

    def measured(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether any kernel that :meth:`runs` them has times."""
        return any(kernel.times and kernel.runs(weight, activation) for kernel in self.kernels)

    def microseconds(
        self, in_features: int, out_features: int, quantization: tuple[Quantization, Quantization | None] | None
    ) -> float:
        """What a Linear takes, by its fastest kernel for (weight, activation), or in float (None).

        Of the nearest measured shape (in the logarithms), in proportion to in_features x out_features.

        Raises:
            TargetError: no such kernel was measured.
        """
        tables = (
            [self.float_times]
            if quantization is None
            else [kernel.times for kernel in self.kernels if kernel.runs(*quantization)]
        )
        found = [_scaled(times, in_features, out_features) for times in tables if times]
        if not found:
            what = (
                "float Linears" if quantization is None else f"weight {quantization[0]}, activation {quantization[1]}"
            )
            raise TargetError(f"target {self.target!r} has no measured times of {what}: choose a target that has them.")
        return min(found)


def _scaled(times: Times, in_features: int, out_features: int) -> float:
    nearest = min(times, key=lambda t: (math.log(t[0] / in_features) ** 2 + math.log(t[1] / out_features) ** 2, t))
    return nearest[2] * (in_features * out_features) / (nearest[0] * nearest[1])
