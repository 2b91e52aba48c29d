"""What compile() and analyze() are asked for, as one value that the parts of a run share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.scheme import Scheme


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to quantize a model; each attribute is the argument of that name of :func:`qcompiler.compile`."""

    scheme: str | Scheme = "w8a8"
    target: str = "ort-cpu"
    calibration: Any = None
    passes: str | None = None
    ignore: Sequence[str] = ()
    bits: Mapping[str, int | str] | None = None
    max_drop: Any = None
    max_size: int | str | None = None
    example_inputs: Any = None
    dynamic_shapes: Any = None
    seed: int = 0
    limit: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    dump: str | os.PathLike[str] | None = None
    trust_remote_code: bool = False
    progress: bool = True
