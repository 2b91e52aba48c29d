"""CUDA kernels: what is emitted and packed, that nvcc takes it, and, where there is a GPU, what they compute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.core import TargetError
from tests.passes.blocks import batches, block

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

import tvm

from qcompiler.targets.tvm.cuda import ARCHITECTURES, CudaKernels, TvmCuda
from qcompiler.targets.tvm.cuda.gemm_int8 import Int8
from qcompiler.targets.tvm.cuda.gemm_w4 import Weight4
from qcompiler.targets.tvm.cuda.source import compile_cubin, cuda_source, nvcc, parameters

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc on this machine")
needs_gpu = pytest.mark.skipif(not tvm.cuda(0).exist, reason="there is no CUDA GPU on this machine")
INT8, INT8_ROW, W4 = Int8(100, 70, "static", True), Int8(96, 64, "row"), Weight4(104, 70, 32, True)


def unpacked(words: np.ndarray) -> np.ndarray:
    """[N, K / 8] words back to [K, N] integers."""
    return ((words[..., None] >> (np.arange(8, dtype=np.uint32) * 4)) & 15).reshape(len(words), -1).T


def test_packing() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (104, 70))
    words = W4.pack(q)
    assert words.shape == (128, 16)
    np.testing.assert_array_equal(unpacked(words)[:104, :70], q)
    scale = rng.random((4, 70)).astype(np.float16)
    groups = W4.pack_groups(scale)
    np.testing.assert_array_equal(groups[:70, :4], scale.T)
    assert not groups[70:].any()
    weight = rng.integers(-127, 128, (100, 70)).astype(np.int8)
    packed = INT8.pack(weight)
    assert packed.shape == (128, 128)
    np.testing.assert_array_equal(packed[:70, :100], weight.T)
    assert not packed[:, 100:].any()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@needs_nvcc
def test_nvcc_takes_the_source(arch: str, tmp_path: Path) -> None:
    source = cuda_source({f"k{i}": k.build(f"k{i}") for i, k in enumerate((INT8, INT8_ROW, W4))}, arch)
    assert source.count("__shared__") == 6
    path = tmp_path / "kernels.cu"
    path.write_text(source)
    cubin = compile_cubin(path, arch).read_bytes()
    assert cubin[:4] == b"\x7fELF"
    assert all(f"k{i}".encode() in cubin for i in range(3))
    path.write_text(source.replace("__dp4a(_", "__no_such_function(_"))
    with pytest.raises(TargetError, match="nvcc does not compile"):
        compile_cubin(path, arch)


@pytest.mark.parametrize(("scheme", "kernel", "sign"), [("w8a8", "int8", "__dp4a"), ("w4a16", "weight4", "half")])
def test_a_models_linears(scheme: str, kernel: str, sign: str, tmp_path: Path) -> None:
    """Every quantized Linear has a kernel; the folder holds all that is needed; a run is refused in a sentence."""
    compiled = qcompiler.compile(
        block(), calibration=batches(), scheme=scheme, passes="annotate,insert,fold", target="tvm-cuda", progress=False
    )
    made = compiled.executable
    assert isinstance(made, CudaKernels)
    assert made.kernels
    assert all(name.startswith(kernel) and f"{name}_kernel" in made.source for name in made.kernels.values())
    assert sign in made.source
    assert compiled.report.output_sqnr_db
    with pytest.raises(TargetError, match="no whole model"):
        compiled.run(batches()[0])
    loaded = qcompiler.load(compiled.save(tmp_path / "out")).executable
    assert isinstance(loaded, CudaKernels)
    assert loaded.source == made.source
    assert loaded.arrays.keys() == made.arrays.keys()
    assert (tmp_path / "out" / "kernels.cubin").is_file() == (nvcc() is not None)
    table = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert set(table["parameters"]) == set(made.kernels.values())
    for linear, name in made.kernels.items():
        constants = {label.removeprefix(f"{linear}.") for label in made.arrays if label.startswith(f"{linear}.")}
        assert set(table["parameters"][name]) == constants | {"x", "y", "m"}


C_TYPES = {"int8": "signed char*", "int32": "int*", "uint32": "uint*", "float32": "float*", "float16": "half*"}
ARGUMENTS = {
    INT8: {"x": "int8", "weight": "int8", "offset": "int32", "scale": "float32", "bias": "float32", "y": "float32"},
    INT8_ROW: {"x": "int8", "weight": "int8", "offset": "int32", "scale": "float32", "x_scale": "float32"}
    | {"x_zero": "int32", "y": "float32"},
    W4: {"x": "float16", "weight": "uint32", "scale": "float16", "zero": "float16", "bias": "float32", "y": "float16"},
}


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_parameters_stand_as_in_the_signature(kernel: Any) -> None:
    """Each name at the place of its type; what is written through is y, and no other."""
    source = cuda_source({"k": kernel.build("k")}, "sm_90")
    names = parameters(source)["k"]
    assert sorted(names) == sorted([*ARGUMENTS[kernel], "m"])
    declared = re.search(r"k_kernel\(([^)]*)\)", source)
    assert declared
    for name, text in zip(names, declared[1].split(","), strict=True):
        assert text.strip().startswith("int64_t " if name == "m" else f"{C_TYPES[ARGUMENTS[kernel][name]]} ")
    assert set(re.findall(r"\b(\w+)_ptr\[[^;=]*\] = ", source)) == {"y"}


def test_architectures_are_named() -> None:
    with pytest.raises(TargetError, match="no architecture 'sm_12'"):
        TvmCuda(arch="sm_12")
    assert {"sm_80", "sm_90"} <= set(ARCHITECTURES)


def on_gpu(kernel: Any, arrays: list[np.ndarray]) -> np.ndarray:
    """The last array, as the kernel leaves it."""
    device = tvm.cuda(0)
    function = tvm.compile(kernel.build("k"), target=tvm.target.Target.from_device(device))["k"]
    tensors = [tvm.runtime.tensor(array, device) for array in arrays]
    function(*tensors)
    return np.asarray(tensors[-1].numpy())


@needs_gpu
@pytest.mark.parametrize("m", [1, 7, 64, 257])
def test_products_on_a_gpu(m: int) -> None:
    rng = np.random.default_rng(m)
    x, weight = np.zeros((m, 128), np.int8), rng.integers(-127, 128, (100, 70)).astype(np.int8)
    x[:, :100] = rng.integers(-128, 128, (m, 100))
    offset, scale, bias = (
        np.pad(v, (0, 58)) for v in (weight.sum(0, dtype=np.int32) * 5, rng.random(70), rng.random(70))
    )
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    y = on_gpu(INT8, [x, INT8.pack(weight), offset, scale, bias, np.zeros((m, 70), np.float32)])
    expected = (x[:, :100].astype(np.int64) @ weight - offset[:70]) * scale[:70] + bias[:70]
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-4)

    q, groups, zero = rng.integers(0, 16, (104, 70)), rng.random((4, 70)) * 0.1, np.full((4, 70), 8)
    a = rng.standard_normal((m, 104)).astype(np.float16)
    arrays = [a, W4.pack(q), W4.pack_groups(groups), W4.pack_groups(zero), bias, np.zeros((m, 70), np.float16)]
    dense = (q - 8) * np.repeat(groups.astype(np.float16).astype(np.float64), 32, axis=0)[:104]
    np.testing.assert_allclose(on_gpu(W4, arrays), a.astype(np.float64) @ dense + bias[:70], rtol=2e-2, atol=2e-2)
