"""What is quantized, and how: frozen data with presets by name and a versioned JSON form."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from qcompiler.core import OptionError, unknown

VERSION = 1
DTYPES = {"int8": (-128, 127), "uint8": (0, 255)}
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        dtype: "int8" or "uint8".
        symmetric: zero_point fixed (0 for int8, 128 for uint8) and the integer range narrow: [-127, 127] about it.
        granularity: per_tensor, per_channel (one scale an output channel), per_token (one scale a row of the
            activation), per_group (one scale for ``group_size`` input channels).
        group_size: input channels that share a scale (per_group only).
        dynamic: the scale is computed at run time from the tensor itself.
        observer: spelling of the observer whose result sets a static scale.
    """

    dtype: str = "int8"
    symmetric: bool = True
    granularity: str = "per_tensor"
    group_size: int | None = None
    dynamic: bool = False
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.granularity not in GRANULARITIES:
            raise unknown("granularity", self.granularity, GRANULARITIES)
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise OptionError(
                f"group_size={self.group_size} with granularity {self.granularity!r}: one needs the other."
            )
        if self.granularity == "per_token" and not self.dynamic:
            raise OptionError("per_token scales are known at run time only: set dynamic=True.")

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        size = f"({self.group_size})" if self.group_size else ""
        return f"{self.dtype} {self.granularity}{size} {kind}"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Specs for every kind of tensor, and which Linears keep away from them.

    Attributes:
        name: the preset's name, or the user's own.
        weight: spec of every Linear's weight.
        activation: spec of every Linear's input, or None for float activations.
        fallback: spec of a Linear's input at sites where the static ``activation`` does not hold, or None: never.
        head: True quantizes the output head as any Linear; False leaves it in float.
        ignore: globs over Linear names that stay in float.
    """

    name: str
    weight: TensorSpec
    activation: TensorSpec | None
    fallback: TensorSpec | None = None
    head: bool = True
    ignore: tuple[str, ...] = ()

    def ignored_by(self, linear: str) -> str | None:
        """The first ignore glob that matches this Linear's name, or None."""
        return next((glob for glob in self.ignore if fnmatch.fnmatchcase(linear, glob)), None)

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
        for key in ("weight", "activation", "fallback"):
            if fields.get(key) is not None:
                fields[key] = TensorSpec(**fields[key])
        try:
            return cls(**{**fields, "ignore": tuple(fields.get("ignore", ()))})
        except TypeError as error:
            raise OptionError(f"scheme {data.get('name')!r} cannot be read: {error}.") from None


_WEIGHT = TensorSpec("int8", symmetric=True, granularity="per_channel")
_STATIC = TensorSpec("uint8", symmetric=False, granularity="per_tensor")
_PER_TOKEN = TensorSpec("uint8", symmetric=True, granularity="per_token", dynamic=True)
_PER_TENSOR_DYNAMIC = TensorSpec("uint8", symmetric=False, granularity="per_tensor", dynamic=True)

PRESETS: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", _WEIGHT, _STATIC, fallback=_PER_TOKEN),
        Scheme("w8a8-dynamic", _WEIGHT, _PER_TOKEN),
        # SmoothQuant's efficiency levels (table 2 of the paper).
        Scheme("w8a8-o1", _WEIGHT, _PER_TOKEN),
        Scheme("w8a8-o2", _WEIGHT, _PER_TENSOR_DYNAMIC),
        Scheme("w8a8-o3", _WEIGHT, _STATIC),
    )
}


def resolve(scheme: str | Scheme, ignore: tuple[str, ...] = ()) -> Scheme:
    """The preset of that name, or the scheme as given; ``ignore`` globs are added to its own.

    Raises:
        OptionError: no preset has that name.
    """
    if isinstance(scheme, str):
        if scheme not in PRESETS:
            raise unknown("scheme", scheme, PRESETS)
        scheme = PRESETS[scheme]
    return dataclasses.replace(scheme, ignore=scheme.ignore + tuple(ignore))
