"""What ONNX Runtime's CPU provider can run, as data, and what this machine's vector unit makes of it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from qcompiler.capability import Capability, Kernel
from qcompiler.targets.base import block_kernels, storage_kernels, table_kernels
from qcompiler.targets.ort import bnb4
from qcompiler.targets.ort.costs import KERNELS, load_costs
from qcompiler.targets.ort.nbits import BLOCK_SIZES

_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


@functools.cache
def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether u8 x s8 products saturate in 16 bits here: x86 without VNNI (onnxruntime issue 6004).

    Where the flags cannot be read on x86, True: 7-bit weights are right everywhere.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return True
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    return not _VNNI_FLAGS & set(flags.split())


def capability(rows: int, vnni: bool | None = None) -> Capability:
    """The kernels with their speeds from the cost table.

    Args:
        rows: tokens in one run, for which speeds and times are given.
        vnni: False asks for weights that are safe on x86 without VNNI, True for the full range; None: as this
            machine is.
    """
    costs = load_costs()
    kernels = []
    for granularity, names in KERNELS.items():
        for name in names:
            speed = costs.speed(granularity, name, rows, 768, 768)
            for dtype in ("uint8", "int8"):
                kernels.append(
                    Kernel(
                        name=name,
                        weight_dtype="int8",
                        weight_granularity="per_channel",
                        activation_dtype=dtype,
                        activation_granularity="per_token" if granularity == "per_token" else "per_tensor",
                        dynamic=granularity != "static",
                        speed=round(speed, 2),
                        times=costs.times(rows, granularity, name),
                    )
                )
    kernels += block_kernels("MatMulNBits", ("float", "", False), dict.fromkeys((2, 4, 8), BLOCK_SIZES))
    # At 2 bits and blocks of 16, accuracy level 4 does not quantize the input: it multiplies in float after all.
    integers = {2: BLOCK_SIZES[1:], 4: BLOCK_SIZES, 8: BLOCK_SIZES}
    kernels += block_kernels("MatMulNBits", ("int8", "per_group", True), integers)
    kernels += [*table_kernels("MatMulBnb4", bnb4.BLOCK_SIZES), *storage_kernels()]
    for name in KERNELS["per_token"][1:]:  # the same operator, with weights of 8 bits: its time is known
        size = int(name.rpartition(".g")[2])
        times = costs.times(rows, "per_token", name)
        kernels.append(Kernel("MatMulNBits", "int8", "per_group", "int8", "per_group", True, None, (size,), times))
    reduce_range = saturates() if vnni is None else not vnni
    return Capability(
        "ort-cpu",
        tuple(kernels),
        reduce_range,
        float_times=costs.times(rows),
        embeddings=dict.fromkeys(("int4", "uint4", "int8", "uint8"), BLOCK_SIZES),
    )
