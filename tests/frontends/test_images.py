"""Folders of images, against transformers' own image processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler.core import DataError
from qcompiler.frontends import open_data
from tests.frontends import tiny

Image = pytest.importorskip("PIL.Image")

VISION = "float[b, 3, 16, 16] pixel_values"
OPTIONS = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 2,
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (name, size) in enumerate({"b.png": (20, 30), "a.jpg": (50, 24), "inner/c.png": (16, 16)}.items()):
        mode = "L" if i == 2 else "RGB"
        shape = size if mode == "L" else (*size, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=None).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_preprocessor_config_is_obeyed(photos: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPTIONS))
    batches = open_data(photos, tiny.source(VISION, tmp_path), batch_size=2)
    assert (batches.samples, len(batches)) == (3, 2)
    got = np.concatenate([batch["pixel_values"] for batch in batches])
    processor = transformers.ViTImageProcessorPil(**{k: v for k, v in OPTIONS.items() if k != "image_processor_type"})
    images = [Image.open(photos / name).convert("RGB") for name in ("a.jpg", "b.png", "inner/c.png")]
    want = processor(images, return_tensors="np")["pixel_values"]
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-5


def test_center_crop(photos: Path, tmp_path: Path) -> None:
    options = {
        **OPTIONS,
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    (batch,) = open_data(photos, tiny.source("float[b, 3, h, w] pixel_values", tmp_path), limit=1)
    image = Image.open(photos / "a.jpg")  # 24 wide, 50 high: the short side becomes 20, the long one 42
    resized = np.asarray(image.resize((20, 42), 2), np.float32)[13:29, 2:18] / 255
    want = (resized - OPTIONS["image_mean"]) / OPTIONS["image_std"]
    assert np.abs(batch["pixel_values"][0] - want.transpose(2, 0, 1)).max() < 1e-5


def test_without_a_config_pixels_lie_in_minus_one_to_one(photos: Path) -> None:
    (batch,) = open_data(photos, tiny.source(VISION))
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert -1 <= batch["pixel_values"].min() < -0.1
    assert 0.1 < batch["pixel_values"].max() <= 1


def test_folders_that_cannot_be_used(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder of images, but tiny is not a vision model"):
        open_data(photos, tiny.source("int64[b, s] input_ids"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in"):
        open_data(tmp_path / "empty", tiny.source(VISION))
    (photos / "d.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"d\.png cannot be read as an image"):
        open_data(photos, tiny.source(VISION))
