"""The schemes that have a name, and their variations by a text: ``"w4a16{group_size=128,head=false}"``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcompiler.core import OptionError, unknown
from qcompiler.scheme import TABLES, Scheme, TensorSpec
from qcompiler.spelling import build_from_spelling, parse_spelling

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
