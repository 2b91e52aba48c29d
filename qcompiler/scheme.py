"""What is quantized, and how: frozen data with a versioned JSON form (``presets`` has those with a name)."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from qcompiler.core import OptionError, unknown

VERSION = 1
DTYPES = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int2": (-2, 1),
    "uint2": (0, 3),
    "int16": (-32768, 32767),
}
TABLES = ("nf4", "fp4")
"""4-bit floats by table (``numerics.codebooks``), for weights in blocks."""
FLOATS = ("float16", "bfloat16")
"""Floats that a weight may be stored in, without a scale."""
BITS = (2, 4, 8)
"""Bits that a weight's integers may have; 16 and "float" leave a Linear in float."""
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        dtype: "int8", "uint8", or for weights also "int4", "uint4", "int2", "uint2", "int16", "nf4", "fp4", "float16",
            "bfloat16".
        symmetric: zero_point fixed (0 for int8, 128 for uint8) and, from 8 bits on, the range narrow: [-127, 127] about
            it.
        granularity: per_tensor, per_channel (one scale an output channel), per_token (one scale a row of the
            activation), per_group (one scale for ``group_size`` input channels).
        group_size: input channels that share a scale (per_group only).
        dynamic: the scale is computed at run time from the tensor itself.
        observer: spelling of the observer whose result sets a static scale.
        zero_point: of asymmetric per-token scales, one integer for all rows; None: the middle of the dtype, or, where
            there is calibration data, the one that suits a site's range best.
        double_quant: the scales of nf4 or fp4 blocks are kept in 8 bits (QLoRA's double quantization).
    """

    dtype: str = "int8"
    symmetric: bool = True
    granularity: str = "per_tensor"
    group_size: int | None = None
    dynamic: bool = False
    observer: str = "minmax"
    zero_point: int | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, *TABLES, *FLOATS):
            raise unknown("dtype", self.dtype, (*DTYPES, *TABLES, *FLOATS))
        if self.granularity not in GRANULARITIES:
            raise unknown("granularity", self.granularity, GRANULARITIES)
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise OptionError(
                f"group_size={self.group_size} with granularity {self.granularity!r}: one needs the other."
            )
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size > 0):
            raise OptionError(f"group_size={self.group_size!r} is no number of input channels: give 16, 32, 64 …")
        if self.granularity == "per_token" and not self.dynamic:
            raise OptionError("per_token scales are known at run time only: set dynamic=True.")
        if self.zero_point is not None and (self.granularity != "per_token" or self.symmetric):
            raise OptionError(f"zero_point={self.zero_point}: only asymmetric per_token scales have a fixed one.")
        self._check_table()
        if self.dtype in FLOATS and (self.granularity != "per_tensor" or not self.symmetric or self.dynamic):
            raise OptionError(
                f"{self.dtype} is for weights, and has no scales: leave granularity and the rest as they are."
            )
        low, high = DTYPES.get(self.dtype, (0, 0))
        if self.zero_point is not None and not low + 2 <= self.zero_point < high:
            raise OptionError(f"zero_point={self.zero_point} leaves {self.dtype} no room on both sides of it.")

    def _check_table(self) -> None:
        if not self.by_table:
            if self.double_quant:
                raise OptionError(f"double_quant is for the scales of {' and '.join(TABLES)}, not of {self.dtype}.")
        elif self.granularity != "per_group" or not self.symmetric or self.dynamic:
            raise OptionError(f"{self.dtype} is for weights, symmetric and in blocks: give a group_size.")

    @property
    def by_table(self) -> bool:
        """Whether the numbers are places in a table of floats, and not integers."""
        return self.dtype in TABLES

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return 4 if self.by_table else int(self.dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))

    def with_bits(self, bits: int) -> TensorSpec:
        """The same spec in integers of another width; a table of 4-bit floats becomes symmetric integers."""
        if bits == self.bits:
            return self
        sign = "u" if self.dtype.startswith("u") else ""
        return dataclasses.replace(self, dtype=f"{sign}int{bits}", double_quant=False)

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        size = f"({self.group_size})" if self.group_size else ""
        zero = "" if self.zero_point is None else f" about {self.zero_point}"
        double = ", scales in int8" if self.double_quant else ""
        return f"{self.dtype} {self.granularity}{size} {kind}{zero}{double}"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Specs for every kind of tensor, and which Linears keep away from them.

    Attributes:
        name: the preset's name, or the user's own.
        weight: spec of every Linear's weight.
        activation: spec of every Linear's input, or None for float activations.
        fallback: spec of a Linear's input at sites where the static ``activation`` does not hold, or None: never.
        head: True quantizes the output head as any Linear; False leaves it in float.
        outlier_threshold: LLM.int8()'s rule: input channels that reach this magnitude over the calibration data stay in
            float, at every quantized Linear. None: ``split`` takes out what lowers a site's error.
        embedding: spec of embedding tables, in groups of each row's features; None: they stay in float.
        ignore: globs over Linear names that stay in float.
        bits: (glob over Linear names, bits of their weights: 2, 4 or 8, or 16: they stay in float); of several globs
            that match, the last holds.
    """

    name: str
    weight: TensorSpec
    activation: TensorSpec | None
    fallback: TensorSpec | None = None
    head: bool = True
    embedding: TensorSpec | None = None
    outlier_threshold: float | None = None
    ignore: tuple[str, ...] = ()
    bits: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.outlier_threshold is not None and not self.outlier_threshold > 0:
            raise OptionError(
                f"scheme {self.name!r}: threshold={self.outlier_threshold} is no magnitude; the paper has 6."
            )
        for glob, bits in self.bits:
            if bits not in (*BITS, 16):
                raise OptionError(f"bits of {glob!r} are {bits!r}: 2, 4 or 8 are possible, and 16 or 'float' for none.")
        act, size = self.activation, self.weight.group_size
        if act is not None and act.group_size is not None and size is not None and size % act.group_size:
            raise OptionError(
                f"scheme {self.name!r} has groups of {act.group_size} in activations and of {size} in weights: "
                "the kernel quantizes both in equal blocks, so the first must divide the second."
            )

    def ignored_by(self, linear: str) -> str | None:
        """The first ignore glob that matches this Linear's name, or None."""
        return next((glob for glob in self.ignore if fnmatch.fnmatchcase(linear, glob)), None)

    def bits_of(self, linear: str) -> tuple[str, int] | None:
        """The last glob of ``bits`` that matches this Linear's name, and its bits; None: none does."""
        return next((item for item in reversed(self.bits) if fnmatch.fnmatchcase(linear, item[0])), None)

    def weight_of(self, linear: str) -> TensorSpec:
        """The spec of the weight of the Linear of that name, if it is quantized."""
        found = self.bits_of(linear)
        return self.weight if found is None or found[1] not in BITS else self.weight.with_bits(found[1])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, with the version of this layout."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheme:
        """The scheme of :meth:`to_json`.

        Raises:
            OptionError: another version, or fields that this version does not know.
        """
        if data.get("version") != VERSION:
            raise OptionError(f"scheme of version {data.get('version')!r}: this qcompiler reads version {VERSION}.")
        fields = {key: value for key, value in data.items() if key != "version"}
        for key in ("weight", "activation", "fallback", "embedding"):
            if fields.get(key) is not None:
                fields[key] = TensorSpec(**fields[key])
        try:
            bits = tuple((glob, bits) for glob, bits in fields.get("bits", ()))
            return cls(**{**fields, "ignore": tuple(fields.get("ignore", ())), "bits": bits})
        except TypeError as error:
            raise OptionError(f"scheme {data.get('name')!r} cannot be read: {error}.") from None
