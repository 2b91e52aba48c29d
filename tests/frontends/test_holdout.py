"""hold_back: a quarter of the samples, drawn by the seed, and no sample on both sides."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import DataError
from qcompiler.frontends.batches import Batches, from_sequence
from qcompiler.frontends.holdout import hold_back
from qcompiler.frontends.inputs import Inputs
from tests.graph.tiny import tiny


def inputs(batch: str = "B") -> Inputs:
    return Inputs(tiny(f"g (float[{batch},4] x) => (float[{batch},4] y) {{ y = Relu(x) }}", {}))


def numbered(sizes: list[int], given: Inputs) -> Batches:
    """Samples that hold their own number."""
    numbers = iter(range(sum(sizes)))
    arrays = [np.array([[next(numbers)] * 4 for _ in range(size)], np.float32) for size in sizes]
    return from_sequence([{"x": array} for array in arrays], given, None)


def seen(batches: Batches) -> list[int]:
    return [int(row[0]) for feeds in batches for row in feeds["x"]]


def test_every_sample_is_on_one_side() -> None:
    given = inputs()
    search, held = hold_back(numbered([8, 8, 3, 1], given), given)
    assert sorted(seen(search) + seen(held)) == list(range(20))
    assert (search.samples, held.samples) == (15, 5)
    assert [len(list(part)) for part in (search, held)] == [search.count, held.count]
    assert seen(held) == seen(held) == sorted(seen(held))


def test_the_seed_draws() -> None:
    given = inputs()
    data = numbered([40], given)
    draws = [seen(hold_back(data, given, seed)[1]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_whole_batches_where_the_model_takes_one_size() -> None:
    given = inputs("2")
    search, held = hold_back(numbered([2] * 20, given), given)
    assert (search.count, held.count) == (15, 5)
    assert all(len(feeds["x"]) == 2 for part in (search, held) for feeds in part)


@pytest.mark.parametrize(("batch", "sizes", "unit"), [("B", [15], "sample"), ("2", [2] * 15, "batch")])
def test_too_few_are_refused(batch: str, sizes: list[int], unit: str) -> None:
    given = inputs(batch)
    with pytest.raises(DataError, match=f"one calibration {unit} in 4 .* needs 16 at least: there are 15"):
        hold_back(numbered(sizes, given), given)
