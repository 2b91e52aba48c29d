"""A small measured search over tilings of the 8-bit product, one shape of Linear at a time, kept on disk by processor.

What was measured once is not measured again, so that with the same file the same model gives the same kernels. The file
is ``tilings.json`` in ``~/.cache/qcompiler``, or in the folder that the environment variable QCOMPILER_CACHE names.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from qcompiler.core import ArtefactError, TargetError
from qcompiler.targets.tvm.engine import use_threads
from qcompiler.targets.tvm.isa import Isa, runs_here
from qcompiler.targets.tvm.kernels.epilogue import Epilogue
from qcompiler.targets.tvm.kernels.gemm_int8 import GemmInt8, Tiling, default_tiling

VERSION = 1
ROWS = (1, 32, 256)
"""Numbers of rows that a tiling is judged on, each by its time against the default's."""
ROUNDS = 9
GAIN = 0.99
"""Another tiling than the default must take less than this of its time: less is the noise of the measurement."""


def candidates(isa: Isa) -> list[Tiling]:
    """Tiles whose accumulators, weights and one activation fit in the registers."""
    tiles = ((4, 4), (6, 4), (8, 3), (8, 2), (12, 2), (6, 2), (4, 2), (8, 1), (12, 1), (3, 3))
    blocks = (96, 192, 384)
    fit = [
        tile for tile in tiles if isa.registers // 2 <= tile[0] * tile[1] and (tile[0] + 1) * tile[1] < isa.registers
    ]
    return [Tiling(*tile, block) for tile in fit for block in blocks]


class Tuner:
    """Tilings by shape, measured where they are not known.

    Args:
        isa: what kernels are made for.
        path: the file; None: where this user's is.

    Raises:
        TargetError: this machine does not run code for ``isa``.
        ArtefactError: the file cannot be read.
    """

    def __init__(self, isa: Isa, path: Path | None = None) -> None:
        if not runs_here(isa):
            raise TargetError(f"tune=true measures, and this machine does not run code for {isa.cpu}: tune there.")
        self.isa = isa
        self.path = path or tilings_file()
        self.key = f"{processor()}, {isa.cpu}, {isa.dot}, {isa.lanes} lanes, tvm {tvm.__version__}"
        self.known = _read(self.path).get(self.key, {})

    def tiling(self, in_features: int, out_features: int) -> Tiling:
        """The fastest tiling for Linears of this shape."""
        shape = f"{in_features}x{out_features}"
        if shape not in self.known:
            best = search(in_features, out_features, self.isa)
            self.known[shape] = [best.rows, best.vectors, best.block]
            self._write()
        return Tiling(*self.known[shape])

    def _write(self) -> None:
        """Replace the file; what another process added meanwhile stays."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = _read(self.path)
        self.known = {**self.known, **found.get(self.key, {})}
        found[self.key] = self.known
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"version": VERSION, "tilings": found}, indent=1, sort_keys=True), encoding="utf-8")
        draft.replace(self.path)


def search(in_features: int, out_features: int, isa: Isa) -> Tiling:
    """The tiling of least mean time, against the default's, over :data:`ROWS`; one thread, in turns."""
    default = default_tiling(out_features, isa)
    tilings = list(dict.fromkeys([default, *candidates(isa)]))
    kernels = [_Run(GemmInt8(in_features, out_features, epilogue=Epilogue(bias=True), tiling=t), isa) for t in tilings]
    use_threads(1)
    try:
        times = np.mean([_relative(kernels, rows) for rows in ROWS], axis=0)
    finally:
        use_threads(0)
    best = int(np.argmin(times))
    return tilings[best] if times[best] < GAIN else default


def _relative(kernels: Sequence[_Run], rows: int) -> list[float]:
    calls = [kernel.prepared(rows) for kernel in kernels]
    repeats = max(1, 200 // rows)
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 1):
        for taken, call in zip(seconds, calls, strict=True):
            start = time.process_time()
            for _ in range(repeats):
                call()
            if turn:  # the first finds nothing in the caches
                taken.append(time.process_time() - start)
    return [statistics.median(a / b for a, b in zip(taken, seconds[0], strict=True)) for taken in seconds]


class _Run:
    """One compiled candidate; the numbers that it multiplies do not matter."""

    def __init__(self, kernel: GemmInt8, isa: Isa) -> None:
        self.kernel, self.isa = kernel, isa
        self.function = tvm.compile(kernel.build(isa, "candidate"), target=isa.target())["candidate"]
        weight = np.ones((kernel.in_features, kernel.out_features), np.int8)
        count = kernel.padded(isa)[1]
        vectors = [np.zeros(count, np.int32), np.ones(count, np.float32), np.zeros(count, np.float32)]
        self.constants = [tvm.runtime.tensor(array) for array in (kernel.pack(weight, isa), *vectors)]

    def prepared(self, rows: int) -> Any:
        """A call on this number of rows."""
        x = tvm.runtime.tensor(np.ones((rows, self.kernel.padded(self.isa)[0]), self.isa.activation))
        y = tvm.runtime.tensor(np.zeros((rows, self.kernel.out_features), np.float32))
        return lambda: self.function(x, *self.constants, y)


def processor() -> str:
    """The model of this machine's processor, as far as it says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    return " ".join(found[name] for name in wanted if name in found) or platform.machine()


def tilings_file() -> Path:
    """Where tilings are kept."""
    folder = os.environ.get("QCOMPILER_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "qcompiler") / "tilings.json"


def digest() -> str:
    """Of the file: with the same one, the same model gives the same kernels."""
    path = tilings_file()
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, list[int]]]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}")
        return {key: {s: [int(n) for n in t] for s, t in shapes.items()} for key, shapes in data["tilings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} is no table of tilings: {error!r}; delete it to measure again.") from error
