"""ONNX files: what opens, what is lazy, and one clear sentence for what does not open."""

import gc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.core import ModelError
from qcompiler.frontends import open_source
from qcompiler.frontends.onnx_file import OPSETS
from qcompiler.frontends.source import tensors
from qcompiler.graph.run import Runner
from tests.frontends import tiny


def _save_external(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(tiny.proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_file_with_inline_weights_runs(tmp_path: Path) -> None:
    onnx.save(tiny.proto(), tmp_path / "small.onnx")
    tiny.write_tokenizer(tmp_path)
    source = open_source(str(tmp_path / "small.onnx"))
    x = np.ones((2, 4), np.float32)
    want = x @ np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(Runner(source.model)({"x": x})["y"], want)
    assert (source.name, source.kind, source.folder) == ("small", "graph", tmp_path)
    assert source.tokenizer == tmp_path / "tokenizer.json"


def test_external_weights_stay_on_disk(tmp_path: Path) -> None:
    source = open_source(_save_external(tmp_path))
    (weight,) = tensors(source.model)
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None  # the check of the paths has let go of its map again
    assert weight.numpy()[3, 3] == 15


def test_large_inline_weights_move_to_a_scratch_file_that_lives_with_the_weights(tmp_path: Path) -> None:
    onnx.save(tiny.proto(width=2100), tmp_path / "large.onnx")  # 17.6 MB
    source = open_source(tmp_path / "large.onnx")
    (weight,) = tensors(source.model)
    assert isinstance(weight, ir.ExternalTensor)
    scratch = Path(weight.path).parent
    model = source.model
    del source
    gc.collect()
    assert weight.numpy()[0, 7] == 7
    del model, weight
    gc.collect()
    assert not scratch.exists()


def test_digest_covers_structure_and_weights(tmp_path: Path) -> None:
    path = _save_external(tmp_path)
    first = open_source(path).sha256
    assert open_source(path).sha256 == first
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    assert open_source(path).sha256 != first


@pytest.mark.parametrize("kind", ["proto", "ir"])
def test_objects_in_memory_are_not_changed(kind: str) -> None:
    original = tiny.proto()
    before = original.SerializeToString(deterministic=True)
    given = original if kind == "proto" else ir.from_proto(original)
    source = open_source(given)
    source.model.graph.node(0).name = "renamed"
    source.model.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 4), np.float32), name="w")
    after = given if kind == "proto" else ir.to_proto(given)
    assert onnx.numpy_helper.to_array(after.graph.initializer[0])[3, 3] == 15
    assert after.graph.node[0].name != "renamed"
    assert original.SerializeToString(deterministic=True) == before
    other = tiny.proto()
    other.graph.initializer[0].raw_data = bytes(64)
    assert source.sha256 == open_source(tiny.proto()).sha256 != open_source(other).sha256


def test_an_ir_model_on_disk_is_hashed_and_left_with_its_views(tmp_path: Path) -> None:
    path = _save_external(tmp_path)
    given = ir.load(path)
    view = given.graph.initializers["w"].const_value.numpy()
    source = open_source(given)
    assert view[3, 3] == 15
    onnx.save(tiny.proto(width=64), path, save_as_external_data=True, location="big.bin", size_threshold=0)
    first = open_source(ir.load(path)).sha256
    changed = ir.load(path)
    weight = changed.graph.initializers["w"]
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name="w")
    assert len({source.sha256, first, open_source(changed).sha256}) == 3


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"PK\x03\x04 this is a zip")
    with pytest.raises(ModelError, match="is not an ONNX file"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        open_source(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.97])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(tiny.proto(width=64), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelError, match="cut off or damaged"):
        open_source(path)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = _save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weight 'w' in 'weights.bin', which is not at .*weights.bin"):
        open_source(path)


def test_truncated_external_data_is_named(tmp_path: Path) -> None:
    path = _save_external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(40))
    with pytest.raises(ModelError, match=r"weights.bin is cut off: weight 'w' ends at byte 64 of 40"):
        open_source(path)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = _save_external(tmp_path / "inner")
    (tmp_path / "inner/weights.bin").rename(tmp_path / "weights.bin")
    (tmp_path / "inner/weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="is refused"):
        open_source(path)


@pytest.mark.parametrize("opset", [10, 24])
def test_unsupported_opset_says_which_are(opset: int) -> None:
    with pytest.raises(ModelError, match=f"uses opset {opset}: opsets 11 to 23 are supported"):
        open_source(tiny.proto(opset))
    assert open_source(tiny.proto(OPSETS[0])).model.opset_imports[""] == 11


def test_invalid_graph() -> None:
    model = tiny.proto()
    model.graph.node.append(model.graph.node[0])
    with pytest.raises(ModelError, match=r"the ModelProto is not a valid graph: .*'y' is redeclared"):
        open_source(model)


def test_no_such_file_and_no_such_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file or folder .*nothing\.onnx"):
        open_source(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match=r"cannot open a builtins\.int: pass a torch"):
        open_source(3)
