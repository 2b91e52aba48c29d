"""The view of experts, and the graph in which each of them computes all rows."""

from __future__ import annotations

import pytest

from qcompiler.graph.experts import chosen, has_experts, on_all_rows, projections
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.graph.verify import relative_error
from tests import mixtures


def test_a_mixture_has_two_projections_of_one_choice() -> None:
    model = mixtures.canonical()
    first, second = projections(model)
    assert first.sort is second.sort
    assert [linear.name for linear in first.linears] == [f"mlp.experts.{e}.gate_up_proj" for e in range(4)]
    assert [linear.name for linear in second.linears] == [f"mlp.experts.{e}.down_proj" for e in range(4)]
    part = chosen(second.linears[2].x)
    assert part is not None
    assert part.source is second.x
    assert chosen(linears(model)[0].x) is None


def test_an_expert_whose_input_is_computed_otherwise_hides_the_projection() -> None:
    model = mixtures.canonical()
    first, _ = projections(model)
    matmul = first.linears[1].matmul
    matmul.replace_input_with(0, first.linears[2].x)
    assert [found.linears[0].name for found in projections(model)] == ["mlp.experts.0.down_proj"]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_rows_through_all_experts_say_the_same(count: int) -> None:
    model = mixtures.canonical()
    dense = model.clone()
    on_all_rows(dense)
    assert not has_experts(dense)
    assert "Concat" not in {node.op_type for node in dense.graph}
    assert [linear.name for linear in linears(dense)] == [linear.name for linear in linears(model)]
    feeds = mixtures.rows(count)
    assert relative_error(Runner(model)(feeds), Runner(dense)(feeds)) <= 1e-6


def test_the_dry_run_shares_rows_out_evenly() -> None:
    model = mixtures.canonical()
    facts = concrete_shapes(model)
    first, _ = projections(model)
    sizes = [facts[linear.x.name or ""].shape for linear in first.linears]
    assert sizes == [(1, 32)] * 4  # two rows of two experts each
