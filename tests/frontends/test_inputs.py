"""What one batch may look like, what is filled in, what is cast, and one sentence for what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.core import DataError
from qcompiler.frontends.inputs import Inputs
from tests.frontends import tiny

TEXT = "int64[b, s] input_ids, int64[b, s] attention_mask, int64[b, s] token_type_ids, int64[b, s] position_ids"
IDS = np.array([[5, 6, 7], [8, 9, 0]], np.int32)


def _inputs(text: str) -> Inputs:
    return Inputs(tiny.source(text).model)


def test_masks_types_and_positions_are_filled_in() -> None:
    feeds = _inputs(TEXT).fit({"input_ids": IDS}, "batch 0")
    assert list(feeds) == ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert all(array.dtype == np.int64 and array.shape == IDS.shape for array in feeds.values())
    assert np.array_equal(feeds["input_ids"], IDS)
    assert feeds["attention_mask"].all()
    assert not feeds["token_type_ids"].any()
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2


def test_tokenizer_outputs_and_labels_are_dropped_and_nothing_else() -> None:
    inputs = _inputs("int64[b, s] input_ids")
    extra = {"input_ids": IDS, "labels": IDS, "token_type_ids": IDS, "special_tokens_mask": IDS}
    assert list(inputs.fit(extra, "batch 0")) == ["input_ids"]
    with pytest.raises(DataError, match=r"batch 4 has 'input_idz', but the model's inputs are input_ids"):
        inputs.fit({"input_idz": IDS}, "batch 4")


@pytest.mark.parametrize("given", [np.float64, np.float16])
def test_floats_become_float32(given: Any) -> None:
    feeds = _inputs("float[b, 2] x").fit({"x": np.ones((3, 2), given)}, "batch 0")
    assert feeds["x"].dtype == np.float32


def test_tuples_arrays_and_lists() -> None:
    two = _inputs("int64[b, s] input_ids, float[b] weight")
    assert list(two.fit((IDS, np.ones(2)), "batch 0")) == ["input_ids", "weight"]
    assert np.array_equal(_inputs("int64[b, s] input_ids").fit(IDS, "batch 0")["input_ids"], IDS)
    assert _inputs("int64[b, s] input_ids").fit({"input_ids": IDS.tolist()}, "batch 0")["input_ids"].dtype == np.int64
    with pytest.raises(DataError, match="batch 0 has 3 arrays, but the model has 2 inputs: pass dicts by name"):
        two.fit((IDS, IDS, IDS), "batch 0")
    with pytest.raises(DataError, match=r"batch 0 lacks the input 'weight' \(float32 \[b\]\)"):
        two.fit((IDS,), "batch 0")


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    feeds = _inputs("float[b, 2] x").fit((torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True),), "batch 0")
    assert feeds["x"].dtype == np.float32
    assert feeds["x"].all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 4), np.int64), r"input 'x' has dtype int64, expected float32 \[b, 4\]"),
        (np.ones(4, np.float32), r"input 'x' has rank 1, expected float32 \[b, 4\]"),
        (np.ones((2, 5), np.float32), r"input 'x' has shape \[2, 5\], expected float32 \[b, 4\]"),
        (np.ones((0, 4), np.float32), r"input 'x' is empty: shape \[0, 4\], expected float32 \[b, 4\]"),
        (np.full((2, 4), np.nan, np.float32), r"input 'x' holds NaN, expected finite float32 \[b, 4\]"),
        (np.full((2, 4), -np.inf, np.float32), r"input 'x' holds infinity, expected finite float32 \[b, 4\]"),
        (np.full((2, 4), 1e300), r"input 'x' holds infinity"),
        (np.array([["a"] * 4]), r"input 'x' has dtype <U1"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_does_not_fit(array: Any, message: str) -> None:
    with pytest.raises(DataError, match="batch 7: " + message):
        _inputs("float[b, 4] x").fit({"x": array}, "batch 7")


def test_floats_are_no_token_ids_and_ragged_lists_no_arrays() -> None:
    inputs = _inputs("int64[b, s] input_ids")
    with pytest.raises(DataError, match=r"'input_ids' has dtype float64, expected int64 \[b, s\]"):
        inputs.fit({"input_ids": np.ones((2, 2))}, "batch 0")
    with pytest.raises(DataError, match="cannot make an array of a list"):
        inputs.fit({"input_ids": [[1], [2, 3]]}, "batch 0")
