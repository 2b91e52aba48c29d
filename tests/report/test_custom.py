import math

import numpy as np
import pytest

from qcompiler.core import OptionError
from qcompiler.report import custom
from qcompiler.report.custom import custom_errors
from qcompiler.report.errors import error_meters
from tests.graphs_int8 import K, N, feeds, float_mlp, quantized_mlp

DATA = [feeds(batch=2, seed=1), feeds(batch=3, seed=2)]


def mean_square(reference: np.ndarray, got: np.ndarray) -> float:
    return float(np.square(reference - got, dtype=np.float64).mean())


@pytest.mark.parametrize("budget", [custom.BUDGET, 1])
def test_a_metric_that_is_the_mse_gives_the_mse(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(custom, "BUDGET", budget)  # 1: every Linear has a run of its own
    got = custom_errors(float_mlp(), quantized_mlp(), DATA, mean_square)
    meters, _ = error_meters(float_mlp(), quantized_mlp(), DATA)
    assert got.keys() == meters.keys()
    assert len(got) == 4
    for key, value in got.items():
        assert value == pytest.approx(meters[key].mse, rel=1e-3)


def test_it_is_given_unmasked_rows_of_one_linear() -> None:
    seen = set()

    def look(reference: np.ndarray, got: np.ndarray) -> float:
        assert reference.dtype == got.dtype == np.float32
        seen.add((reference.shape, got.shape))
        return 0.0

    custom_errors(float_mlp(), quantized_mlp(), [feeds(batch=2, sequence=6, padded=True)], look)
    assert seen == {((6, N), (6, N)), ((6, K), (6, K))}


def _raises(reference: np.ndarray, got: np.ndarray) -> float:
    raise ZeroDivisionError("no rows\nmore")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (_raises, "metric '_raises' at Linear 'fc1' failed: ZeroDivisionError: no rows."),
        (lambda reference, got: math.nan, "returned nan: a finite number"),
        (lambda reference, got: math.inf, "returned inf"),
        (lambda reference, got: None, "returned a NoneType: one number"),
        (lambda reference, got: got, "returned a ndarray: one number"),
        (lambda reference: 0.0, "TypeError"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_in_a_sentence(metric, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError) as error:
        custom_errors(float_mlp(), quantized_mlp(), DATA, metric)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
