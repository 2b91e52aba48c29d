from __future__ import annotations

import pytest

from tests.graph.rules.spelling import counts, normal, raised, spelled

INDICES = "zero = Constant<value = int64 {0}>() last = Constant<value = int64 {-1}>()"


@pytest.mark.parametrize("sizes", ["split = Constant<value = int64 {5}>()", "split = Constant<value_ints = [5, 3]>()"])
def test_a_sequence_taken_apart_is_a_split(sizes: str) -> None:
    body = f"""{INDICES} {sizes} s = SplitToSequence<axis = 1>(x, split) a = SequenceAt(s, zero)
        b = SequenceAt(s, last) y = Concat<axis = 1>(b, a)"""
    model = raised(spelled(f"g (float[B, 8] x) => (float[B, 8] y) {{ {body} }}"), {"x": normal(2, 8)})
    assert counts(model) == {"Split": 1, "Concat": 1}


def test_a_sequence_that_is_used_as_one_stays() -> None:
    body = """split = Constant<value = int64 {4}>() s = SplitToSequence<axis = 1>(x, split)
        y = ConcatFromSequence<axis = 0>(s)"""
    model = raised(spelled(f"g (float[B, 8] x) => (float[C, 4] y) {{ {body} }}"), {"x": normal(2, 8)})
    assert counts(model) == {"SplitToSequence": 1, "ConcatFromSequence": 1}


def test_a_position_that_is_computed_stays() -> None:
    body = "split = Constant<value = int64 {4}>() s = SplitToSequence<axis = 1>(x, split) y = SequenceAt(s, i)"
    import numpy as np

    model = raised(
        spelled(f"g (float[B, 8] x, int64 i) => (float[B, 4] y) {{ {body} }}"), {"x": normal(2, 8), "i": np.array(1)}
    )
    assert "SequenceAt" in counts(model)
