"""The test models themselves: an export computes what its torch module does, at other shapes than the traced one."""

import numpy as np
import onnxruntime as ort
import pytest

from tests import families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_export_matches_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(families.exported(name), options, providers=["CPUExecutionProvider"])
    with families.quiet():
        module = families.FAMILIES[name]()
    feeds = families.feeds(name, batch=3, seq=7, seed=1)
    with torch.no_grad():
        want = module(*map(torch.from_numpy, feeds.values())).numpy()
    (got,) = session.run([families.OUTPUT[name]], feeds)
    rows = feeds["attention_mask"] == 1 if "attention_mask" in feeds else slice(None)
    assert np.abs(got[rows] - want[rows]).max() <= 5e-6 * np.abs(want[rows]).max()
    assert want.std() > 1e-2


def test_feeds_are_seeded_and_padded() -> None:
    one, two = families.feeds("bert", 3, 8, seed=5), families.feeds("bert", 3, 8, seed=5)
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert one["attention_mask"].sum(1).tolist() == [8, 7, 6]
