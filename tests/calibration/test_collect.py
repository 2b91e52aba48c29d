"""One run for all requests: results, padding, bounded memory, and what bad data is told."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.calibration import collect, make_observer
from qcompiler.calibration.collect import unpadded
from qcompiler.core import DataError, ModelError, OptionError, StatRequest
from qcompiler.graph import run
from qcompiler.graph.experts import projections
from qcompiler.graph.run import Runner
from tests import mixtures

MODEL = """<ir_version: 10, opset_import: ["": 21]>
    g (float[B, S, 4] x, int64[B, S] attention_mask) => (float[B, S, 4] y)
    <float one = {1.0}, int64[1] axes = {1}, int64[4] heads = {0, 0, 2, 2}>
    {
        h = Relu(x)
        split = Reshape(h, heads)
        per_head = Transpose<perm = [0, 2, 1, 3]>(split)
        root = Sqrt(x)
        guarded = Exp(root)
        y = Add(h, one)
    }"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(MODEL))


def feeds(batch: int = 2, sequence: int = 3, seed: int = 0, lengths: list[int] | None = None) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).uniform(0.1, 1, (batch, sequence, 4)).astype(np.float32)
    lengths = lengths or [sequence] * batch
    mask = (np.arange(sequence) < np.array(lengths)[:, None]).astype(np.int64)
    return {"x": x, "attention_mask": mask}


def request(value: str, observer: str = "minmax", axis: int | None = None) -> StatRequest:
    return StatRequest(value, observer, axis)


def test_results_of_inputs_inner_values_and_outputs(model: ir.Model) -> None:
    data = [feeds(seed=i) for i in range(3)]
    whole = np.concatenate([batch["x"].reshape(-1, 4) for batch in data])
    requests = [request("x"), request("y"), request("h", axis=-1), request("h", "rows", -1), request("x", "absmax", -1)]
    stats = collect(model, data, requests, progress=False)
    assert set(stats) == set(requests)
    assert stats[request("x")] == (whole.min(), whole.max())
    assert stats[request("y")][1] == whole.max() + 1
    np.testing.assert_array_equal(stats[request("h", axis=-1)], (whole.min(0), whole.max(0)))
    np.testing.assert_array_equal(np.sort(stats[request("h", "rows", -1)], axis=0), np.sort(whole, axis=0))
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_padding_is_not_observed(model: ir.Model) -> None:
    batch = feeds(lengths=[3, 1])
    batch["x"][1, 1:] = 1000.0
    kept = batch["x"][batch["attention_mask"] != 0]
    stats = collect(model, [batch], [request("h"), request("h", "rows"), request("per_head", axis=-1)], progress=False)
    assert stats[request("h")] == (kept.min(), kept.max())
    assert stats[request("h", "rows")].shape == (4, 4)
    np.testing.assert_array_equal(stats[request("per_head", axis=-1)][1], kept.reshape(-1, 2).max(0))


def test_unpadded_knows_the_shapes_of_transformers() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    token = np.arange(6, dtype=np.float32).reshape(2, 3, 1) + np.zeros(5, np.float32)
    for value in (token, token.reshape(6, 5)):
        rows, samples = unpadded(value, mask, 2)
        assert rows[:, 0].tolist() == [0, 1, 3]
        assert samples.tolist() == [0, 0, 1]
    heads = np.broadcast_to(token[:, None], (2, 4, 3, 5))
    rows, samples = unpadded(heads, mask, 2)
    assert rows[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 3, 3, 3, 3]
    assert samples.tolist() == [0] * 8 + [1] * 4
    per_token = np.broadcast_to(token[:, :, None], (2, 3, 2, 5))
    assert unpadded(per_token, mask, 2)[0][:, 0].tolist() == [0, 0, 1, 1, 3, 3]
    assert unpadded(token[:, 0], mask, 2)[0].shape == (2, 5)
    assert unpadded(token[0], None, 2)[1].tolist() == [0, 0, 0]
    assert unpadded(np.float32(3), mask, 2)[0].shape == (1, 1)
    assert unpadded(token, None, 2)[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_equal_requests_share_one_observer_and_one_run(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(spelling: str, axis: int | None, seed: int) -> object:
        made.append(spelling)
        return make_observer(spelling, axis, seed)

    module = sys.modules["qcompiler.calibration.collect"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "make_observer", counting)
    opened: list[object] = []
    opening = run.open_session
    monkeypatch.setattr(run, "open_session", lambda *args: opened.append(args) or opening(*args))
    collect(model, [feeds()], [request("h"), request("h"), request("x"), request("h", "mse")], progress=False)
    assert sorted(made) == ["minmax", "minmax", "mse"]
    assert len(opened) == 1


def test_row_samples_of_a_step_are_the_same_tokens(model: ir.Model) -> None:
    requests = [request("h", "rows{count=16}"), request("y", "rows{count=16}", -1)]
    data = [feeds(8, 16, seed, lengths=[16, 3, 5, 7, 1, 2, 9, 16]) for seed in range(3)]
    h, y = (collect(model, data, requests, seed=5, progress=False)[r] for r in requests)
    np.testing.assert_array_equal(h + np.float32(1), y)
    again = collect(model, data, requests, seed=5, progress=False)
    np.testing.assert_array_equal(h, again[requests[0]])
    assert not np.array_equal(h, collect(model, data, requests, seed=6, progress=False)[requests[0]])


def test_folds_deal_out_samples_over_all_batches(model: ir.Model) -> None:
    data = [feeds(3, 4, seed, lengths=[4, 2, 3]) for seed in range(3)]  # samples 0 to 8
    kept = [(3 * i + j, b["x"][j][b["attention_mask"][j] != 0]) for i, b in enumerate(data) for j in range(3)]
    [sample] = collect(model, data, [request("h", "folds{folds=2}", -1)], progress=False).values()
    for fold in range(2):
        mine = np.concatenate([x for number, x in kept if number % 2 == fold])
        np.testing.assert_array_equal(sample.low[fold], mine.min(0))
        np.testing.assert_array_equal(sample.high[fold], mine.max(0))
        np.testing.assert_array_equal(np.sort(sample.rows[sample.fold == fold], axis=0), np.sort(mine, axis=0))


def test_folds_without_rows_are_left_out(model: ir.Model) -> None:
    [sample] = collect(model, [feeds(2)], [request("h", "folds{folds=4}", -1)], progress=False).values()
    assert sample.low.shape == (2, 4)
    assert set(sample.fold) == {0, 1}


class Stream:
    """Batches made on the way, so that the data itself takes no memory."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (feeds(8, 512, seed) for seed in range(self.number))


def test_ten_times_the_data_takes_the_same_memory(model: ir.Model) -> None:
    observers = ("minmax", "ema", "moving", "percentile", "mse", "kl", "absmean", "rows", "folds", "hessian")
    requests = [request(value, observer) for value in ("h", "guarded", "y") for observer in observers]
    collect(model, Stream(1), requests, progress=False)
    peaks = []
    for number in (5, 50):
        tracemalloc.start()
        collect(model, Stream(number), requests, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


def test_no_request_runs_nothing(model: ir.Model) -> None:
    assert collect(model, [], []) == {}


def test_empty_data_is_refused(model: ir.Model) -> None:
    with pytest.raises(DataError, match="empty"):
        collect(model, [], [request("h")], progress=False)
    with pytest.raises(DataError, match=r"'h'.*padding only"):
        collect(model, [feeds(lengths=[0, 0]) | {"attention_mask": np.zeros((2, 3), np.int64)}], [request("h")])


def test_a_nan_is_traced_to_where_it_first_appears(model: ir.Model) -> None:
    bad = feeds()
    bad["x"][0, 0, 0] = -1.0
    with pytest.raises(
        DataError, match=r"'guarded' holds NaN in calibration batch 1; NaN first appears in 'root' \(Sqrt\)"
    ):
        collect(model, [feeds(), bad], [request("h"), request("guarded")], progress=False)


def test_a_nan_in_the_data_names_the_input(model: ir.Model) -> None:
    bad = feeds()
    bad["x"][1, 2, 3] = np.nan
    with pytest.raises(DataError, match="input 'x'"):
        collect(model, [bad], [request("y")], progress=False)


def test_infinity_is_refused(model: ir.Model) -> None:
    bad = feeds()
    bad["x"][1, 2, 3] = np.inf
    with pytest.raises(DataError, match="'h' holds inf in calibration batch 0"):
        collect(model, [bad], [request("h")], progress=False)


def test_bad_padding_hurts_nobody(model: ir.Model) -> None:
    bad = feeds(lengths=[3, 2])
    bad["x"][1, 2] = np.nan
    low, _ = collect(model, [bad], [request("h")], progress=False)[request("h")]
    assert np.isfinite(low)


def test_unknown_values_and_observers_are_refused(model: ir.Model) -> None:
    with pytest.raises(ModelError, match="no value 'nowhere'"):
        collect(model, [feeds()], [request("nowhere")], progress=False)
    with pytest.raises(OptionError, match="minmax"):
        collect(model, [feeds()], [request("h", "min-max")], progress=False)


def test_progress_keeps_stdout_clean(model: ir.Model, capfd: pytest.CaptureFixture[str]) -> None:
    collect(model, [feeds()], [request("h")], progress=True)
    assert capfd.readouterr() == ("", "")


def test_an_expert_is_calibrated_on_its_own_rows_that_are_no_padding() -> None:
    model = mixtures.canonical(8, 4)
    first, second = projections(model)
    x = mixtures.rows(12, 8)["x"]
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    feeds = {"x": x, "attention_mask": mask}
    ids = Runner(model, [first.ids.name or ""])({"x": x})[first.ids.name].reshape(12, 2)
    for projection in (first, second):
        requests = [StatRequest(linear.x.name or "", "minmax", -1) for linear in projection.linears]
        source = Runner(model, [projection.x.name or ""])({"x": x})[projection.x.name].reshape(12, 2, -1)
        found = collect(model, [feeds], requests, progress=False)
        for expert, request in enumerate(requests):
            rows = source[(ids == expert) & (mask.reshape(12, 1) != 0)]
            assert len(rows) < len(source[ids == expert]) or expert  # expert 0 is chosen by some padding
            np.testing.assert_allclose(found[request], (rows.min(0), rows.max(0)), rtol=1e-5)


def test_an_expert_that_no_row_chose_is_judged_by_all_rows() -> None:
    model = mixtures.canonical(8, 4, 16, 1)
    first, _ = projections(model)
    x = mixtures.rows(2, 8)["x"]
    requests = [StatRequest(linear.x.name or "", "minmax") for linear in first.linears]
    found = collect(model, [{"x": x}], requests, progress=False)
    everywhere = [request for request in requests if found[request] == (x.min(), x.max())]
    assert len(everywhere) >= 14
