"""spelling: names and options as text."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.core import OptionError
from qcompiler.spelling import build_from_spelling, parse_spelling, spell


@dataclasses.dataclass(frozen=True)
class Options:
    alpha: float | None = None
    bits: int = 8
    name: str = "mse"
    search: bool = True


def test_parse_spelling() -> None:
    assert parse_spelling("smooth{alpha=0.5, bits=4},insert , fold") == [
        ("smooth", {"alpha": "0.5", "bits": "4"}),
        ("insert", {}),
        ("fold", {}),
    ]
    assert parse_spelling("") == []


@pytest.mark.parametrize("text", ["smooth{alpha}", "smooth{alpha=0.5", "a b", "{x=1}", "smooth}}"])
def test_parse_spelling_refuses(text: str) -> None:
    with pytest.raises(OptionError, match="cannot read"):
        parse_spelling(text)


def test_build_reads_types_and_none() -> None:
    built = build_from_spelling("pass", Options, "x", {"alpha": "0.25", "bits": "4", "name": "kl", "search": "false"})
    assert built == Options(0.25, 4, "kl", False)
    assert build_from_spelling("pass", Options, "x", {"alpha": "none"}).alpha is None


def test_build_refuses_unknown_and_wrong_type() -> None:
    with pytest.raises(OptionError, match="unknown option of pass 'x' 'alfa': did you mean 'alpha'"):
        build_from_spelling("pass", Options, "x", {"alfa": "1"})
    with pytest.raises(OptionError, match="option bits=four of pass 'x' is not of type int"):
        build_from_spelling("pass", Options, "x", {"bits": "four"})


@given(
    st.builds(
        Options,
        alpha=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        bits=st.integers(),
        name=st.from_regex(r"[a-z]+", fullmatch=True).filter(lambda text: text != "none"),
        search=st.booleans(),
    )
)
def test_spelling_round_trips(options: Options) -> None:
    [(name, parsed)] = parse_spelling(spell("x", options))
    assert build_from_spelling("pass", Options, name, parsed) == options
