"""Sizes that are known up to the model's open axes: polynomials with integer coefficients.

TVM's own simplifier does not divide batch · sequence · 64 by batch · sequence; every size of a Transformer is such a
polynomial, and exact division is all that a Reshape needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

Size = Union[int, "Dim"]
Term = tuple[str, ...]


class Dim:
    """Σ coefficient · Π symbols; immutable. Arithmetic gives a plain int where no symbol is left."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Term, int]) -> None:
        self.terms = {term: number for term, number in terms.items() if number}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for term, number in _terms(other).items():
            terms[term] = terms.get(term, 0) + number
        return _simple(terms)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return _simple({term: -number for term, number in self.terms.items()})

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: Size) -> Size:
        return -self + other

    def __mul__(self, other: Size) -> Size:
        terms: dict[Term, int] = {}
        for a, x in self.terms.items():
            for b, y in _terms(other).items():
                key = tuple(sorted(a + b))
                terms[key] = terms.get(key, 0) + x * y
        return _simple(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        return quotient(self, other)

    def __repr__(self) -> str:
        parts = ["*".join([*([str(n)] if n != 1 or not t else []), *t]) for t, n in sorted(self.terms.items())]
        return " + ".join(parts)


def symbol(name: str) -> Dim:
    """An open axis."""
    return Dim({(name,): 1})


def quotient(a: Size, b: Size) -> Size:
    """a / b where it is exact.

    Raises:
        ValueError: it is not, or b has several terms.
    """
    above, below = _terms(a), _terms(b)
    if len(below) != 1:
        if above == below:
            return 1
        raise ValueError(f"{a} / {b} is no polynomial")
    ((divisor, number),) = below.items()
    result: dict[Term, int] = {}
    for term, count in above.items():
        rest = list(term)
        for name in divisor:
            if name not in rest:
                raise ValueError(f"{a} / {b} is no polynomial")
            rest.remove(name)
        if count % number:
            raise ValueError(f"{a} / {b} is no whole number")
        result[tuple(rest)] = count // number
    return _simple(result)


def product(sizes: Sequence[Size]) -> Size:
    """Of all sizes; 1 of none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def axes_of(size: Size) -> set[str]:
    """The symbols in it."""
    return {name for term in _terms(size) for name in term}


def evaluate(size: Size, symbols: Mapping[str, Any]) -> Any:
    """The size with numbers or expressions for its symbols."""
    total: Any = None
    for term, number in _terms(size).items():
        part: Any = number
        for name in term:
            part = symbols[name] if part is number and number == 1 else part * symbols[name]
        total = part if total is None else total + part
    return 0 if total is None else total


def _terms(size: Size) -> Mapping[Term, int]:
    return size.terms if isinstance(size, Dim) else ({(): int(size)} if size else {})


def _simple(terms: Mapping[Term, int]) -> Size:
    kept = {term: number for term, number in terms.items() if number}
    return Dim(kept) if any(kept) else kept.get((), 0)


def to_json(size: Size) -> Any:
    """A number, or a list of [coefficient, symbol, symbol …]."""
    return [[number, *term] for term, number in sorted(size.terms.items())] if isinstance(size, Dim) else int(size)


def from_json(data: Any) -> Size:
    """The size of :func:`to_json`.

    Raises:
        ValueError: it is none.
    """
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    if not isinstance(data, list) or not all(isinstance(item, list) and item for item in data):
        raise ValueError(f"{data!r} is no size")
    return Dim({tuple(map(str, term)): int(number) for number, *term in data})
