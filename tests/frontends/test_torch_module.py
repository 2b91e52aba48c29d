"""torch modules: derived dynamic shapes, names, and leaving the caller's module alone."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import ModelError
from qcompiler.frontends import open_source
from qcompiler.graph.run import Runner

torch = pytest.importorskip("torch")


class Embedder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(16, 8)
        self.drop = torch.nn.Dropout(0.5)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(self.table(ids)) * mask.unsqueeze(-1)
        return {"hidden": hidden, "scores": self.out(hidden)}


class Fixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(3, 6))


def _run(model: torch.nn.Module, *arrays: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {k: v.numpy() for k, v in model.eval()(*map(torch.from_numpy, arrays)).items()}


def test_axes_are_dynamic_and_names_are_the_modules() -> None:
    module = Embedder()
    module.train()
    ids = torch.ones((1, 5), dtype=torch.int64)
    source = open_source(module, example_inputs=(ids, ids))  # one object twice: two inputs all the same
    assert module.training
    assert module.drop.training
    runner = Runner(source.model)
    assert runner.inputs == ["ids", "mask"]
    assert runner.outputs == ["hidden", "scores"]
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 16, (3, 9)), rng.integers(0, 2, (3, 9))
    got, want = runner({"ids": a, "mask": b}), _run(module, a, b)
    assert all(np.abs(got[k] - want[k]).max() < 1e-6 for k in want)
    assert {"table.weight", "out.weight", "out.bias"} <= set(source.model.graph.initializers)
    assert source.notes == ()
    assert (source.name, source.kind) == ("Embedder", "graph")
    assert open_source(module, example_inputs={"ids": ids, "mask": ids}).sha256 == source.sha256


def test_axis_that_cannot_be_dynamic_is_static_with_a_note() -> None:
    source = open_source(Fixed(), example_inputs=torch.randn(3, 6))
    (note,) = source.notes
    assert (note.node, note.what) == ("x", "axis 0 is static")
    assert list(source.model.graph.inputs[0].shape) == [3, 6]
    assert source.model.graph.outputs[0].name == "output"


def test_given_dynamic_shapes_are_obeyed() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm(dim=-1, keepdim=True)

    source = open_source(
        Norm(), example_inputs=(torch.randn(2, 3, 4),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},)
    )
    shape = source.model.graph.inputs[0].shape
    assert shape is not None
    assert (shape[0], shape[2]) == (2, 4)
    assert not isinstance(shape[1], int)


def test_exported_program() -> None:
    module, example = Embedder().eval(), torch.ones((2, 5), dtype=torch.int64)
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (example, example.clone()), dynamic_shapes=(dims, dict(dims)))
    source = open_source(program)
    ids = np.random.default_rng(1).integers(0, 16, (4, 3))
    want = _run(module, ids, np.ones_like(ids))["scores"]
    assert np.abs(Runner(source.model)({"ids": ids, "mask": np.ones_like(ids)})["scores"] - want).max() < 1e-6


def test_no_stack_traces_of_this_machine_in_the_graph() -> None:
    source = open_source(Fixed(), example_inputs=torch.randn(3, 6))
    assert not any(node.metadata_props for node in source.model.graph)


def test_bad_modules_get_one_sentence() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match=r"Fixed is a torch module: pass example_inputs"):
        open_source(Fixed())
    with pytest.raises(ModelError, match=r"Branching cannot be traced: .") as caught:
        open_source(Branching(), example_inputs=torch.randn(3))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="Fixed cannot be traced"):
        open_source(Fixed(), example_inputs=torch.randn(5, 5))
