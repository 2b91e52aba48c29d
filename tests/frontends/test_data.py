"""Data of every kind as batches: counted, limited, re-iterable, never whole in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.core import DataError
from qcompiler.frontends import open_data
from tests.frontends import tiny

X = "float[b, 4] x"


def _rows(batches: Any) -> list[list[float]]:
    return [batch["x"][:, 0].tolist() for batch in batches]


def _numbered(count: int, size: int = 2) -> Iterator[dict[str, np.ndarray]]:
    for i in range(count):
        yield {"x": np.full((size, 4), i, np.float32)}


def test_lists_keep_their_batches() -> None:
    batches = open_data(list(_numbered(3)), tiny.source(X))
    assert (batches.samples, len(batches)) == (6, 3)
    assert _rows(batches) == _rows(batches) == [[0, 0], [1, 1], [2, 2]]


def test_a_generator_can_be_read_twice_and_its_spool_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batches = open_data(_numbered(3), tiny.source(X))
    assert (batches.samples, len(batches)) == (6, 3)
    assert _rows(batches) == _rows(batches) == [[0, 0], [1, 1], [2, 2]]
    assert len(list(tmp_path.glob("*/*.npz"))) == 3
    del batches
    assert not list(tmp_path.iterdir())


def test_a_long_stream_is_not_held_in_memory() -> None:
    source = tiny.source("float[b, 4096] x")
    tracemalloc.start()
    try:
        stream = ({"x": np.full((16, 4096), i, np.float32)} for i in range(100))  # 26 MB
        batches = open_data(stream, source)
        total = sum(float(batch["x"][0, 0]) for batch in batches)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 4950
    assert peak < 5e6


@pytest.mark.parametrize("kind", ["list", "generator", "npz", "dict"])
def test_limit_counts_samples(kind: str, tmp_path: Path) -> None:
    whole = {"x": np.repeat(np.arange(4, dtype=np.float32), 2)[:, None] * np.ones((1, 4), np.float32)}
    np.savez(tmp_path / "data.npz", **whole)
    data = {"list": list(_numbered(4)), "generator": _numbered(4), "npz": tmp_path / "data.npz", "dict": whole}[kind]
    batches = open_data(data, tiny.source(X), limit=3, batch_size=2)
    assert batches.samples == 3
    assert _rows(batches) == [[0, 0], [1]]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_batches(tmp_path: Path, order: Any, save: Any) -> None:
    x = np.random.default_rng(0).standard_normal((11, 4, 3))
    save(tmp_path / "d.npz", x=np.asarray(x, order=order), n=np.arange(11, dtype=np.int32))
    batches = open_data(tmp_path / "d.npz", tiny.source("float[b, 4, 3] x, int64[b] n"), batch_size=4)
    assert (batches.samples, len(batches)) == (11, 3)
    assert [batch["n"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert np.array_equal(np.concatenate([batch["x"] for batch in batches]), x.astype(np.float32))


def test_npz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"d\.npz is not a readable \.npz file"):
        open_data(path, tiny.source(X))
    np.savez(path, x=np.ones((3, 4), np.float32), y=np.ones(5))
    with pytest.raises(
        DataError, match=r"do not agree on the number of samples, their first axis: x \[3, 4\], y \[5\]"
    ):
        open_data(path, tiny.source(X))
    np.savez(path, x=np.array([None, 1], object))
    with pytest.raises(DataError, match="holds Python objects"):
        open_data(path, tiny.source(X))


def test_data_loader_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rows = torch.arange(10, dtype=torch.float64)[:, None] * torch.ones(1, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4, shuffle=True)
    batches = open_data(loader, tiny.source(X))
    assert (batches.samples, len(batches)) == (10, 3)
    first, second = _rows(batches), _rows(batches)
    assert first == second  # shuffled once, then kept
    assert sorted(value for batch in first for value in batch) == list(range(10))


def test_one_array_is_cut_into_batches() -> None:
    assert _rows(open_data(np.ones((5, 4), np.float32), tiny.source(X), batch_size=3)) == [[1, 1, 1], [1, 1]]
    with pytest.raises(DataError, match="one array cannot feed the 2 inputs x, z"):
        open_data(np.ones((5, 4), np.float32), tiny.source(X + ", float[b] z"))


def test_fixed_batch_of_the_model_is_obeyed() -> None:
    batches = open_data({"x": np.ones((6, 4), np.float32)}, tiny.source("float[3, 4] x"), batch_size=8)
    assert [len(batch["x"]) for batch in batches] == [3, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the calibration data is empty"),
        (iter(()), "the calibration data is empty"),
        ([{"x": np.full((1, 4), np.nan, np.float32)}], "batch 0: input 'x' holds NaN"),
        ([{"z": np.ones((1, 4), np.float32)}], "batch 0 has 'z', but the model's inputs are x"),
        (7, "cannot read data from a int"),
        ("nowhere.txt", r"there is no file or folder nowhere\.txt"),
        (["a text"], "text cannot be fed to tiny, which has no input 'input_ids' but x"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(data, tiny.source(X))


def test_later_batches_are_checked_at_once() -> None:
    with pytest.raises(DataError, match="batch 2: input 'x' has rank 1"):
        open_data([*_numbered(2), {"x": np.ones(4, np.float32)}], tiny.source(X))


def test_bad_options_and_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="limit is 0"):
        open_data([np.ones((1, 4))], tiny.source(X), limit=0)
    with pytest.raises(DataError, match="batch_size is 0"):
        open_data([np.ones((1, 4))], tiny.source(X), batch_size=0)
    (tmp_path / "d.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"d\.csv is no text file"):
        open_data(tmp_path / "d.csv", tiny.source(X))
