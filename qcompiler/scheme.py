"""What is quantized, and how: frozen data with presets by name and a versioned JSON form."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from qcompiler.core import OptionError, build_from_spelling, parse_spelling, unknown

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


_WEIGHT = TensorSpec("int8", symmetric=True, granularity="per_channel")
_STATIC = TensorSpec("uint8", symmetric=False, granularity="per_tensor")
_PER_TOKEN = TensorSpec("uint8", symmetric=False, granularity="per_token", dynamic=True)
_PER_TOKEN_SYMMETRIC = TensorSpec("uint8", symmetric=True, granularity="per_token", dynamic=True)
_PER_TENSOR_DYNAMIC = TensorSpec("uint8", symmetric=False, granularity="per_tensor", dynamic=True)

_INT8_GROUPS = TensorSpec("int8", granularity="per_group", group_size=32, dynamic=True)


def _in_groups(dtype: str, group_size: int = 32) -> TensorSpec:
    return TensorSpec(dtype, granularity="per_group", group_size=group_size)


def _by_table(dtype: str) -> TensorSpec:
    return TensorSpec(dtype, granularity="per_group", group_size=64, double_quant=True)


PRESETS: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", _WEIGHT, _STATIC, fallback=_PER_TOKEN),
        Scheme("w8a8-dynamic", _WEIGHT, _PER_TOKEN),
        # SmoothQuant's efficiency levels (table 2 of the paper).
        Scheme("w8a8-o1", _WEIGHT, _PER_TOKEN_SYMMETRIC),
        Scheme("w8a8-o2", _WEIGHT, _PER_TENSOR_DYNAMIC),
        Scheme("w8a8-o3", _WEIGHT, _STATIC),
        # Vector-wise int8 and a decomposition (Dettmers et al. 2022, section 3), which leave the head in float.
        Scheme("llm-int8", _WEIGHT, _PER_TOKEN_SYMMETRIC, head=False, outlier_threshold=6.0),
        # Weights in groups (MatMulNBits): "a16" multiplies float activations, "a8" quantizes them in the same groups.
        Scheme("w8a16", _in_groups("int8"), None),
        Scheme("w4a16", _in_groups("int4"), None),
        Scheme("w4a8", _in_groups("int4"), _INT8_GROUPS),
        Scheme("w2a16", _in_groups("int2"), None),
        # 16 bits in the file, float when the model is loaded.
        Scheme("w16", TensorSpec("int16", granularity="per_channel"), None),
        Scheme("fp16", TensorSpec("float16"), None),
        Scheme("bf16", TensorSpec("bfloat16"), None),
        # 4-bit floats by table (QLoRA), their scales in 8 bits.
        *(Scheme(name, _by_table(name), None) for name in TABLES),
    )
}


def resolve(scheme: str | Scheme, ignore: tuple[str, ...] = (), bits: Mapping[str, Any] | None = None) -> Scheme:
    """The preset of that name, or the scheme as given; ``ignore`` globs and ``bits`` are added to its own.

    A preset may be varied: ``"w4a16{group_size=128,symmetric=false,head=false}"``; ``group_size=none`` stands for one
    scale an output channel. ``"nf4{double_quant=false}"`` keeps the scales of blocks in float,
    ``"w4a16{embedding=4}"`` quantizes embeddings to 4 bits as well, ``"llm-int8{threshold=5.0}"`` sets its threshold.

    Raises:
        OptionError: no preset has that name, or it has no such option.
    """
    if isinstance(scheme, str):
        scheme = _spelled(scheme)
    more = tuple((glob, 16 if number == "float" else number) for glob, number in (bits or {}).items())
    return dataclasses.replace(scheme, ignore=scheme.ignore + tuple(ignore), bits=scheme.bits + more)


@dataclasses.dataclass(frozen=True)
class _Variation:
    """What may be changed of a preset by its spelling."""

    group_size: int | None
    symmetric: bool
    head: bool
    double_quant: bool
    embedding: int | None
    threshold: float | None


def _spelled(text: str) -> Scheme:
    items = parse_spelling(text)
    if len(items) != 1:
        raise OptionError(f"one scheme is wanted, not {text!r}.")
    name, options = items[0]
    if name not in PRESETS:
        raise unknown("scheme", name, PRESETS)
    scheme = PRESETS[name]
    if not options:
        return scheme
    weight = scheme.weight
    _check_options(scheme, options)
    now = {
        "group_size": str(weight.group_size).lower(),
        "symmetric": str(weight.symmetric),
        "head": str(scheme.head),
        "double_quant": str(weight.double_quant),
        "embedding": "none",
        "threshold": str(scheme.outlier_threshold).lower(),
    }
    new: _Variation = build_from_spelling("scheme", _Variation, name, {**now, **options})
    if weight.granularity == "per_group":
        scheme = dataclasses.replace(
            scheme,
            weight=_varied(weight, new),
            activation=None if scheme.activation is None else _regrouped(scheme.activation, new.group_size),
        )
    embedding = None if new.embedding is None else _of_embedding(new)
    return dataclasses.replace(
        scheme,
        name=text.replace(" ", ""),
        head=new.head,
        embedding=embedding,
        outlier_threshold=new.threshold,
    )


def _check_options(scheme: Scheme, options: Mapping[str, str]) -> None:
    if scheme.weight.granularity != "per_group" and set(options) & {"group_size", "symmetric", "double_quant"}:
        raise OptionError(f"scheme {scheme.name!r} has no groups: its options are head and embedding.")
    if "threshold" in options and scheme.outlier_threshold is None:
        raise OptionError(f"scheme {scheme.name!r} has no threshold: llm-int8 keeps outlier channels in float by one.")


def _of_embedding(new: _Variation) -> TensorSpec:
    """As the weights': with the same groups, a tied head and embedding are the same numbers."""
    dtype = f"{'' if new.symmetric else 'u'}int{new.embedding}"
    return TensorSpec(dtype, new.symmetric, "per_group", new.group_size or 32)


def _varied(weight: TensorSpec, new: _Variation) -> TensorSpec:
    """The weight's spec in other groups; asymmetric integers are unsigned."""
    dtype = weight.dtype if new.symmetric or weight.by_table else f"u{weight.dtype.removeprefix('u')}"
    return dataclasses.replace(
        weight,
        dtype=dtype,
        symmetric=new.symmetric,
        granularity="per_channel" if new.group_size is None else "per_group",
        group_size=new.group_size,
        double_quant=new.double_quant,
    )


def _regrouped(activation: TensorSpec, group_size: int | None) -> TensorSpec:
    """Activations follow the weights' groups; where those have none, blocks of 128 are the fastest."""
    return dataclasses.replace(activation, group_size=group_size or 128)
