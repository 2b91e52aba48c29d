"""A quantized Linear as compressed-tensors stores it: integers in words, scales, zero points, shape.

The layout is that of ``compressors/pack_quantized`` in compressed-tensors 0.20: q in [-2^(bits-1), 2^(bits-1) - 1] is
kept as q + 2^(bits-1), which is what an unsigned grid has already; weights are packed along the inputs, zero points
along the outputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.core import TargetError
from qcompiler.graph.excerpt import detached
from qcompiler.graph.weights import folded_grid
from qcompiler.numerics.packing import pack_words
from qcompiler.targets.hf.files import Tensor
from qcompiler.targets.ort.nbits import Blocks, blocks_of

FORMAT = "pack-quantized"


@dataclasses.dataclass(frozen=True, order=True)
class Kind:
    """How weights are quantized; ``group_size`` None: one scale an output channel."""

    bits: int
    symmetric: bool
    group_size: int | None

    def __str__(self) -> str:
        sign = "symmetric" if self.symmetric else "asymmetric"
        where = "per channel" if self.group_size is None else f"in groups of {self.group_size}"
        return f"{self.bits} bits, {sign}, {where}"

    def to_json(self) -> dict[str, Any]:
        """A ``QuantizationArgs`` of compressed-tensors."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }


def kind_of(dequantize: ir.Node) -> Kind | None:
    """The kind of a folded weight [in, out]; None for one that is not in 2, 4 or 8 bits with a scale by output."""
    grid = folded_grid(dequantize)
    if grid is None or grid.scale is None or grid.zero_point is None or grid.scale.ndim == 0:
        return None
    bits = (grid.high - grid.low).bit_length()
    middle = grid.low + (1 << (bits - 1))
    whole = grid.group_size is None or len(grid.scale) == 1
    symmetric = bool((grid.zero_point == middle).all())
    return Kind(bits, symmetric, None if whole else grid.group_size) if bits in (2, 4, 8) else None


def packed(dequantize: ir.Node, kind: Kind) -> dict[str, Tensor]:
    """The tensors of a Linear's weight by what follows the module's name; read when they are written."""
    dequantize = detached(dequantize)
    weight, scale = dequantize.inputs[0], dequantize.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    assert scale is not None
    assert scale.shape is not None
    rows, columns = (int(size) for size in weight.shape.numpy())
    groups = 1 if kind.group_size is None else int(scale.shape.numpy()[0])

    def blocks() -> Blocks:
        found = blocks_of(dequantize)
        assert found is not None
        return found

    made = {
        "weight_packed": Tensor(
            "I32", (columns, _words(rows, kind.bits)), lambda: pack_words(np.asarray(blocks().q.T, np.uint8), kind.bits)
        ),
        "weight_scale": Tensor("F32", (columns, groups), lambda: blocks().scale.reshape(groups, columns).T),
        "weight_shape": Tensor("I64", (2,), lambda: np.array([columns, rows], np.int64)),
    }
    if not kind.symmetric:

        def zero_points() -> np.ndarray[Any, Any]:
            zeros = blocks().zero_point.reshape(groups, columns)
            return pack_words(np.asarray(zeros, np.uint8), kind.bits).T

        made["weight_zero_point"] = Tensor("I32", (_words(columns, kind.bits), groups), zero_points)
    return made


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def quantization_config(kinds: Mapping[str, Kind], ignore: list[str], dense: bool = False) -> dict[str, Any]:
    """What config.json says of the quantized modules, by name, and of the torch.nn.Linear that are float.

    The kind that most modules have is that of all "Linear" but the ignored, others are named. Zero points load only
    where transformers dequantizes at once (5.23 with compressed-tensors 0.20 takes their packed form for a mismatch),
    and for that it knows one kind a model. ``dense`` asks for that too: some module is of a subclass of
    torch.nn.Linear, whose own code looks for the weight that packing takes from it (FalconLinear).

    Raises:
        TargetError: weights of several kinds, where transformers must dequantize at once.
    """
    counts = Counter(kinds.values())
    order = sorted(counts, key=lambda kind: (-counts[kind], kind))
    asymmetric = not all(kind.symmetric for kind in order)
    if (asymmetric or dense) and len(order) > 1:
        what, way = "zero points", "a symmetric scheme, or one width and group for all"
        if dense:
            what, way = "Linears of a class of the model's own", "one width, group and symmetry for all"
        raise TargetError(
            f"target 'hf' would have weights of {len(order)} kinds ({'; '.join(map(str, order))}), and transformers "
            f"loads {what} in models of one kind only: take {way}."
        )
    groups = {}
    for number, kind in enumerate(order):
        names = sorted(name for name, other in kinds.items() if other == kind)
        groups[f"group_{number}"] = {
            "targets": names if number else ["Linear"],
            "weights": kind.to_json(),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return {**config, "dequantize": True} if asymmetric or dense else config
