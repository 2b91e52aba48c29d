"""Sizes as polynomials: they must agree with the arithmetic of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tvm")

from qcompiler.targets.tvm.emit.dims import (
    Dim,
    Size,
    evaluate,
    from_json,
    product,
    quotient,
    symbol,
    to_json,
)

B, S = symbol("batch"), symbol("sequence")
terms = st.dictionaries(
    st.lists(st.sampled_from(["batch", "sequence"]), max_size=2).map(lambda names: tuple(sorted(names))),
    st.integers(-5, 5),
    max_size=3,
)
polynomials = terms.map(Dim)
values = st.fixed_dictionaries({"batch": st.integers(1, 9), "sequence": st.integers(1, 9)})


@given(polynomials, polynomials, values)
def test_arithmetic(a: Dim, b: Dim, at: dict[str, int]) -> None:
    x, y = evaluate(a, at), evaluate(b, at)
    assert evaluate(a + b, at) == x + y
    assert evaluate(a - b, at) == x - y
    assert evaluate(a * b, at) == x * y
    assert from_json(to_json(a)) == a


@given(polynomials, st.integers(1, 7), values)
def test_exact_division(a: Dim, number: int, at: dict[str, int]) -> None:
    divisor: Size = B * S * number
    result = quotient(a * divisor, divisor)
    assert evaluate(result, at) == evaluate(a, at)


def test_what_is_not_exact_is_refused() -> None:
    assert quotient(B * S * 64, B * S) == 64
    assert quotient(B + S, B + S) == 1
    for a, b in ((S * 3, 2), (B, S), (B * S, B + S)):
        with pytest.raises(ValueError, match="is no"):
            quotient(a, b)
    assert product([]) == 1
    assert B - B == 0
    with pytest.raises(ValueError, match="no size"):
        from_json("batch")
