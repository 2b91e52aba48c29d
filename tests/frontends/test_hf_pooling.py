"""modules.json of sentence-transformers, in its spellings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.frontends.hf_pooling import Pooling, read_pooling, transformer_folder


def _folder(path: Path, types: list[str], pooling: dict[str, Any], transformer: str = "") -> Path:
    modules = [{"path": transformer, "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": f"{i}_{t}", "type": f"sentence_transformers.models.{t}"} for i, t in enumerate(types, 1)]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return path


@pytest.mark.parametrize(
    ("types", "options", "want"),
    [
        (["Pooling", "Normalize"], {"pooling_mode_mean_tokens": True}, Pooling("mean", True)),
        (["Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling("cls", False)),
        (["Pooling"], {"pooling_mode": "cls"}, Pooling("cls", False)),
    ],
)
def test_supported(tmp_path: Path, types: list[str], options: dict[str, Any], want: Pooling) -> None:
    assert read_pooling(_folder(tmp_path, types, options)) == (want, ())


@pytest.mark.parametrize(
    ("types", "options", "why"),
    [
        (["Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens is not supported"),
        (["Pooling"], {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "is not supported"),
        (["Pooling", "Dense", "Normalize"], {"pooling_mode_mean_tokens": True}, "asks for Pooling, Dense, Normalize"),
    ],
)
def test_unsupported_leaves_a_note(tmp_path: Path, types: list[str], options: dict[str, Any], why: str) -> None:
    pooling, (note,) = read_pooling(_folder(tmp_path, types, options))
    assert pooling is None
    assert why in note.why


def test_plain_folder_and_subfolder(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == (None, ())
    assert transformer_folder(tmp_path) == tmp_path
    _folder(tmp_path, ["Pooling"], {"pooling_mode": "mean"}, transformer="0_Transformer")
    assert transformer_folder(tmp_path) == tmp_path / "0_Transformer"


def test_numbers() -> None:
    torch = pytest.importorskip("torch")
    hidden = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert np.allclose(Pooling("mean", False)(hidden, mask), [[2.0, 2.0]])
    assert np.allclose(Pooling("cls", True)(hidden, mask), [[0.6, 0.8]])
