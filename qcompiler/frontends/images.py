"""A folder of images as pixel values, by the rules of the model's ``preprocessor_config.json``."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError
from qcompiler.frontends.batches import Batches, from_reader
from qcompiler.frontends.inputs import Inputs
from qcompiler.frontends.source import Source

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_BILINEAR = 2


def from_folder(folder: Path, source: Source, inputs: Inputs, *, limit: int | None, batch_size: int) -> Batches:
    """Every image below ``folder``, in the order of their names, read anew at each iteration.

    Size, rescaling, mean and standard deviation come from ``preprocessor_config.json`` beside the model; without one,
    pixels are scaled to [-1, 1] and the size is the model's.

    Raises:
        DataError: the model is no vision model, there are no images, or one cannot be read.
    """
    if source.kind != "vision":
        raise DataError(f"{folder} is a folder of images, but {source.name} is not a vision model.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise DataError(f"there are no images in {folder} ({', '.join(sorted(SUFFIXES))}).")
    name = inputs.all[0].name
    prepare = _Preprocessor(source, inputs)
    size = inputs.fixed(name, 0) or batch_size
    if inputs.fixed(name, 0) is not None:
        paths = paths[: len(paths) // size * size]

    def read() -> Generator[dict[str, Any], None, None]:
        for start in range(0, len(paths), size):
            yield {name: np.stack([prepare(path) for path in paths[start : start + size]])}

    return from_reader(read, inputs)


class _Preprocessor:
    """Resize, crop, rescale, normalize: what transformers' image processors do, as far as the JSON says it."""

    def __init__(self, source: Source, inputs: Inputs) -> None:
        name = inputs.all[0].name
        path = source.folder / "preprocessor_config.json" if source.folder is not None else None
        options = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
        self._mode = "L" if inputs.fixed(name, 1) == 1 else "RGB"
        wanted = (inputs.fixed(name, 2), inputs.fixed(name, 3))
        declared = options.get("crop_size") if options.get("do_center_crop") else None
        self._size = _height_width(wanted if None not in wanted else declared or options.get("size") or 224)
        size = options.get("size")
        self._edge = size.get("shortest_edge") if isinstance(size, dict) and options.get("do_center_crop") else None
        self._resample = options.get("resample", _BILINEAR)
        self._factor = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
        normalize = options.get("do_normalize", True)
        channels = len(self._mode)
        self._mean = _vector(options.get("image_mean", 0.5) if normalize else 0.0, channels)
        self._std = _vector(options.get("image_std", 0.5) if normalize else 1.0, channels)

    def __call__(self, path: Path) -> npt.NDArray[np.float32]:
        """[channels, height, width]."""
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError("reading images needs Pillow: pip install 'qcompiler[torch]'.") from error
        height, width = self._size
        try:
            with Image.open(path) as opened:
                image = opened.convert(self._mode)
        except OSError as error:
            raise DataError(f"{path} cannot be read as an image: {error}.") from error
        if self._edge is not None:
            scale = self._edge / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), self._resample)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), self._resample)
        pixels = np.asarray(image, np.float32).reshape(height, width, len(self._mode))
        return ((pixels * self._factor - self._mean) / self._std).transpose(2, 0, 1).astype(np.float32)


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        edge = int(size.get("shortest_edge", 224))
        return int(size.get("height", edge)), int(size.get("width", edge))
    if isinstance(size, tuple | list):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def _vector(value: Any, channels: int) -> npt.NDArray[np.float32]:
    return np.broadcast_to(np.asarray(value, np.float32), (channels,))
