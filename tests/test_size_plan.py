"""max_size's choice: single errors propose, what whole choices lose on other samples decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir
import pytest

from qcompiler.passes.fold import Fold
from qcompiler.presets import resolve
from qcompiler.size_plan import Choice, Losses, Plan
from tests.passes.blocks import LINEARS, apply, batches, block, context, quantize

SIZES = [[80, 10, 20, 40]] * 3
ERRORS = [[0.0, 0.1, 0.02, 0.0], [0.0, 0.1, 0.05, 0.0], [0.0, 0.02, 0.01, 0.0]]


class Told(Losses):
    """Losses that the test sets; what it does not name loses 1."""

    def __init__(self, losses: dict[Choice, float]) -> None:
        self.losses, self.where, self.asked = losses, "here", 0

    def of(self, choices: Sequence[Choice]) -> list[float]:
        self.asked += 1
        return [self.losses.get(choice, 1.0) for choice in choices]


def plan(losses: dict[Choice, float]) -> Plan:
    return Plan((("a",), ("b",), ("c",)), (2, 4, 8), SIZES, ERRORS, 100, Told(losses))


def test_candidates_fit_and_are_what_they_say() -> None:
    made = plan({})
    assert made.candidates(70) == {
        (2, 3, 1): "mixed",
        (2, 2, 2): "4 bits everywhere",
        (1, 1, 1): "2 bits everywhere",
    }
    assert made.candidates(30) == {(1, 1, 1): "2 bits everywhere"}
    assert list(made.candidates(240)) == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert made.bytes((2, 3, 1)) == 170


@pytest.mark.parametrize(
    ("losses", "choice", "name"),
    [
        ({(2, 3, 1): 0.1, (2, 2, 2): 0.2}, (2, 3, 1), "mixed"),
        ({(2, 3, 1): 0.2, (2, 2, 2): 0.1}, (2, 2, 2), "4 bits everywhere"),
        ({(2, 3, 1): math.nan, (2, 2, 2): math.nan}, (1, 1, 1), "2 bits everywhere"),
        ({(2, 3, 1): 1.0}, (2, 3, 1), "mixed"),
    ],
)
def test_what_loses_least_is_chosen(losses: dict[Choice, float], choice: Choice, name: str) -> None:
    chosen, told = plan(losses).choose(70)
    assert chosen == choice
    assert told.startswith(f"{name}; measured here: mixed {losses[2, 3, 1]:.2e}, ")


def test_one_candidate_is_not_measured() -> None:
    made = plan({})
    assert made.choose(30) == ((1, 1, 1), "2 bits everywhere")
    assert isinstance(made.losses, Told)
    assert made.losses.asked == 0


def test_whole_choices_are_measured_where_single_ones_were_not() -> None:
    trials = [folded(bits) for bits in (2, 8)]
    groups = [("q0",), ("k", "up0"), ("down0",), ("post",), ("logits0",)]
    assert sorted(name for group in groups for name in group) == sorted(LINEARS)
    data = batches(2)
    both, first, second = (Losses(block(), trials, groups, part) for part in (data, data[:1], data[1:]))
    assert (both.where, first.where) == ("on samples that no single error was measured on", "on the same samples")
    alone = both.alone()
    assert alone == first.alone() != second.alone()
    assert all(two > eight > exact == 0 for exact, two, eight in alone)
    choices = [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2), (1, 2, 0, 0, 0), (0, 1, 0, 0, 0)]
    losses = both.of(choices)
    assert losses == second.of(choices) != first.of(choices)
    assert first.of(choices[-1:]) == [alone[1][1]]
    assert losses[0] > losses[2] > losses[1]


def folded(bits: int) -> ir.Model:
    model = block()
    scheme = context(dataclasses.replace(resolve("w4a16{group_size=16}"), bits=(("*", bits),)))
    quantize(model, scheme)
    apply(Fold(), model, scheme)
    return model
