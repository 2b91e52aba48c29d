"""distill(): what is learned, from which positions, and when it stops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from qcompiler.core import ModelError
from qcompiler.graph.edit import array_of
from qcompiler.graph.run import Feeds, Runner
from tests.graph.tiny import tiny

pytest.importorskip("torch")
from qcompiler.training.distill import distill

TEXT = """g (float[B,S,4] x, int64[B,S] attention_mask) => (float[B,S,6] y) {
    h = MatMul(x, a)
    n = LayerNormalization(h, gain)
    y = MatMul(n, b)
}"""
SHAPES = {"a": (4, 5), "gain": (5,), "b": (5, 6)}


def batches(count: int, padding: float) -> Iterator[Feeds]:
    """The last two of six positions are padding, whose numbers are ``padding``."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.standard_normal((4, 6, 4)).astype(np.float32)
        mask = np.ones((4, 6), np.int64)
        x[:, 4:], mask[:, 4:] = padding, 0
        yield {"x": x, "attention_mask": mask}


def test_weights_that_are_trained_come_back_and_no_others_change() -> None:
    teacher = tiny(TEXT, SHAPES)
    arrays = {name: array_of(value) for name, value in teacher.graph.initializers.items()}
    start = arrays["b"] * np.float32(0.7)
    student = tiny(TEXT, {**arrays, "b": start})
    learned = distill(teacher, student, {"b": 0.02}, batches(300, 0.0), 300, progress=False)
    assert list(learned) == ["b"]
    feeds = next(batches(1, 0.0))
    want, got = (Runner(m, threads=1)(feeds)["y"][:, :4] for m in (teacher, tiny(TEXT, {**arrays, **learned})))
    np.testing.assert_allclose(got, want, atol=0.06)
    np.testing.assert_array_equal(array_of(student.graph.initializers["b"]), start)


def test_padding_teaches_nothing() -> None:
    teacher, student = tiny(TEXT, SHAPES), tiny(TEXT, {**SHAPES, "b": np.zeros((5, 6), np.float32)})
    one, other = (distill(teacher, student, {"b": 0.01}, batches(20, p), 20, progress=False) for p in (0.0, 50.0))
    np.testing.assert_array_equal(one["b"], other["b"])
    assert np.abs(one["b"]).max() > 0


def test_norms_are_told_apart_too() -> None:
    """Where the output is zero whatever ``a`` is, the norm's own error still moves ``a``."""
    silent = {**SHAPES, "b": np.zeros((5, 6), np.float32)}
    teacher, student = tiny(TEXT, silent), tiny(TEXT, {**silent, "a": np.ones((4, 5), np.float32)})
    learned = distill(teacher, student, {"a": 0.02}, batches(300, 0.0), 300, progress=False)

    def apart(a: np.ndarray) -> float:
        model = tiny(TEXT, {**silent, "a": a})
        feeds = next(batches(1, 0.0))
        norms = [Runner(m, ["n"], threads=1)(feeds)["n"][:, :4] for m in (teacher, model)]
        return float(np.square(norms[0] - norms[1]).sum())

    assert apart(learned["a"]) < 0.2 * apart(np.ones((4, 5), np.float32))


def test_a_loss_that_is_no_number_stops_it() -> None:
    teacher, student = tiny(TEXT, SHAPES), tiny(TEXT, {**SHAPES, "b": np.full((5, 6), np.nan, np.float32)})
    with pytest.raises(ModelError, match="the loss is nan at step 0: give a lower rate"):
        distill(teacher, student, {"b": 0.01}, batches(3, 0.0), 3, progress=False)
