"""Vector units: how many lanes, and how each multiplies 8-bit integers.

A *dot* multiplies ``group`` neighbouring values of an activation row with the same rows of ``lanes`` weight columns and
adds them to ``lanes`` int32 sums. All are exact:

- ``vnni``: vpdpbusd, u8 x s8 in groups of four.
- ``maddubs``: vpmaddubsw, then vpmaddwd by ones. Pairs are summed in 16 bits with saturation, so that the weights must
  satisfy |w[2i]| + |w[2i + 1]| <= 128 (7-bit weights do).
- ``maddwd``: vpmaddwd on 16-bit activations and widened weights, in groups of two: the full range without VNNI.
- ``plain``: LLVM's own vector arithmetic, for any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.core import TargetError

_MADDUBS = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
_MADDWD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
_VPDPBUSD = {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}

FEATURES = ("sse4.2", "avx", "avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avxvnni")
"""What tells processors apart here, as LLVM calls it."""

QUAD = 4
"""Neighbouring values of K that a dot with unsigned weights takes."""

DOTS = ("vnni", "maddubs", "maddwd", "plain")


@dataclasses.dataclass(frozen=True)
class Isa:
    """A processor as the kernels see it.

    Attributes:
        cpu: LLVM's name of the processor, e.g. "znver4".
        dot: one of :data:`DOTS`.
        lanes: 32-bit lanes of a vector.
        registers: vector registers: what tiles of accumulators must fit in.
    """

    cpu: str
    dot: str
    lanes: int
    registers: int

    @property
    def group(self) -> int:
        """Neighbouring values of K that one dot takes."""
        return 4 if self.dot in ("vnni", "maddubs") else 2

    @property
    def activation(self) -> str:
        """The type that quantized activations are stored in: always the numbers 0 … 255."""
        return "uint8" if self.group == 4 else "int16"

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of columns of one tile of accumulators."""
        return (8, 2) if self.registers >= 32 else (6, 2)

    def target(self) -> Any:
        """The TVM target."""
        return tvm.target.Target({"kind": "llvm", "mcpu": self.cpu})

    def multiply_add(self, sums: Any, activation: Any, weights: Any) -> Any:
        """The dot.

        Args:
            sums: int32 x lanes.
            activation: ``group`` values of type :attr:`activation`, as one int32.
            weights: int8 x (lanes * group), as :meth:`qcompiler.targets.tvm.kernels.gemm_int8.GemmInt8.pack` has it.
        """
        lanes = self.lanes
        spread = T.broadcast(activation, lanes)
        if self.dot == "vnni":
            bytes_ = T.reinterpret(spread, dtype=f"int8x{4 * lanes}")
            return _intrinsic(_VPDPBUSD[lanes], f"int32x{lanes}", sums, bytes_, weights)
        if self.dot == "maddubs":
            bytes_ = T.reinterpret(spread, dtype=f"int8x{4 * lanes}")
            pairs = _intrinsic(_MADDUBS[lanes], f"int16x{2 * lanes}", bytes_, weights)
            ones = T.broadcast(tirx.const(1, "int16"), 2 * lanes)
            return sums + _intrinsic(_MADDWD[lanes], f"int32x{lanes}", pairs, ones)
        words = T.reinterpret(spread, dtype=f"int16x{2 * lanes}")
        wide = T.cast(weights, f"int16x{2 * lanes}")
        if self.dot == "maddwd":
            return sums + _intrinsic(_MADDWD[lanes], f"int32x{lanes}", words, wide)
        low = T.cast(T.Shuffle([wide], list(range(0, 2 * lanes, 2))), f"int32x{lanes}")
        high = T.cast(T.Shuffle([wide], list(range(1, 2 * lanes, 2))), f"int32x{lanes}")
        first, second = (activation << 16) >> 16, activation >> 16
        return sums + T.broadcast(first, lanes) * low + T.broadcast(second, lanes) * high

    def multiply_add_unsigned(self, sums: Any, activation: Any, weights: Any, bits: int) -> Any:
        """The dot of signed activations with unsigned weights, four at a time whatever the processor.

        Args:
            sums: int32 x lanes.
            activation: four int8, -127 … 127, as one int32.
            weights: uint8 x (lanes * 4), below 2^bits.
            bits: of a weight.
        """
        lanes = self.lanes
        if self.dot == "plain":
            return _plain_dot(sums, activation, weights, lanes)
        bytes_ = T.reinterpret(T.broadcast(activation, lanes), dtype=f"int8x{QUAD * lanes}")
        if self.dot == "vnni":
            return _intrinsic(_VPDPBUSD[lanes], f"int32x{lanes}", sums, weights, bytes_)
        # Two products of at most 15 · 127 fit 16 bits; those of 8 bits are taken by halves.
        for half in range(1 if bits <= 4 else 2):
            part = weights
            if bits > 4:
                count = QUAD * lanes
                four, low = (T.broadcast(tirx.const(number, "uint8"), count) for number in (4, 15))
                part = weights >> four if half else weights & low
            pairs = _intrinsic(_MADDUBS[lanes], f"int16x{2 * lanes}", part, bytes_)
            ones = T.broadcast(tirx.const(16 if half else 1, "int16"), 2 * lanes)
            sums = sums + _intrinsic(_MADDWD[lanes], f"int32x{lanes}", pairs, ones)
        return sums

    def look_up(self, table: Sequence[float], index: Any) -> Any:
        """table[index & 15] in each lane: sixteen floats in one AVX-512 register, whatever else is in the index."""
        values = T.Shuffle([tirx.const(np.float32(v), "float32") for v in table], list(range(self.lanes)))
        return _intrinsic("llvm.x86.avx512.permvar.sf.512", "float32x16", values, index)


def _plain_dot(sums: Any, activation: Any, weights: Any, lanes: int) -> Any:
    for place in range(QUAD):
        column = T.cast(T.Shuffle([weights], list(range(place, QUAD * lanes, QUAD))), f"int32x{lanes}")
        value = (activation << (24 - 8 * place)) >> 24
        sums = sums + T.broadcast(value, lanes) * column
    return sums


def _intrinsic(name: str, dtype: str, *arguments: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)


def detect(cpu: str | None = None) -> Isa:
    """The Isa of a processor, its fastest dot that takes all weights.

    Args:
        cpu: LLVM's name; None: this machine's. ("native" would silently become a generic one.)

    Raises:
        TargetError: LLVM does not know the name.
    """
    name = cpu or str(tvm.target.codegen.llvm_get_system_cpu())
    if not tvm.target.codegen.llvm_is_valid_cpu(name, tvm.target.codegen.llvm_get_system_triple()):
        raise TargetError(f"LLVM knows no processor {name!r}: take one that `llc -mcpu=help` lists, e.g. 'znver4'.")
    target = tvm.target.Target({"kind": "llvm", "mcpu": name})

    def has(*features: str) -> bool:
        return all(tvm.target.codegen.llvm_cpu_has_features(feature, target) for feature in features)

    if has("avx512f", "avx512bw", "avx512vl"):
        return Isa(name, "vnni" if has("avx512vnni") else "maddwd", 16, 32)
    if has("avx2", "fma"):
        return Isa(name, "vnni" if has("avxvnni") else "maddwd", 8, 16)
    return Isa(name, "plain", 4, 16)


def fits_maddubs(weight: npt.NDArray[Any]) -> bool:
    """Whether no pair of this weight [in, out] can saturate: 255 · (|w[2i]| + |w[2i + 1]|) <= 32767."""
    magnitude = np.abs(weight.astype(np.int32))
    if len(magnitude) % 2:
        magnitude = np.concatenate([magnitude, np.zeros_like(magnitude[:1])])
    return bool((magnitude[0::2] + magnitude[1::2] <= 128).all())


def with_narrow_weights(isa: Isa) -> Isa:
    """The faster Isa for weights that all satisfy :func:`fits_maddubs`."""
    return dataclasses.replace(isa, dot="maddubs") if isa.dot == "maddwd" else isa


def runs_here(isa: Isa) -> bool:
    """Whether this machine has the instructions of code compiled for ``isa``.

    Compared by the vector features that tell processors apart; code of a generic x86-64 runs on all of them.
    """
    cpu = str(tvm.target.codegen.llvm_get_system_cpu())
    if cpu == isa.cpu:
        return True
    own, wanted = (tvm.target.Target({"kind": "llvm", "mcpu": name}) for name in (cpu, isa.cpu))
    has = tvm.target.codegen.llvm_cpu_has_features
    return all(has(feature, own) for feature in FEATURES if has(feature, wanted))
