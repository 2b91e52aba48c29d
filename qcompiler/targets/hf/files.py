"""A Hugging Face folder on disk: safetensors written tensor by tensor, in shards with an index, and what lies beside.

``safetensors``' own writers want a whole file's tensors in memory; these hold one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.frontends.safetensors_file import DTYPES, Entry

SHARD = 5 * 10**9
"""Bytes after which another file is begun."""
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Suffixes of what a tokenizer, a processor or the model's own code may consist of."""
_OURS = ("config.json", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor to be written: ``code`` is safetensors' name of its type, ``read`` gives its numbers, or bytes."""

    code: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any] | bytes]
    size: int | None = None

    @staticmethod
    def of(entry: Entry) -> Tensor:
        """A tensor as another file has it."""
        return Tensor(entry.code, entry.shape, entry.raw, entry.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size if self.size is not None else math.prod(self.shape) * _item(self.code)

    def bytes(self) -> bytes:
        """What the file will hold."""
        numbers = self.read()
        return numbers if isinstance(numbers, bytes) else np.asarray(numbers, order="C").tobytes()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard: int = SHARD) -> None:
    """Write model.safetensors, or as many files as ``shard`` bytes want and model.safetensors.index.json."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0])
        return
    places = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, part)
        places.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file; tensors of large items come first, which keeps all aligned."""
    order = sorted(tensors, key=lambda name: (-_item(tensors[name].code), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].code, "shape": tensors[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            written = file.write(tensors[name].bytes())
            if written != tensors[name].nbytes:
                raise OSError(f"{name} has {written} bytes instead of {tensors[name].nbytes}: its source has changed")


def _item(code: str) -> int:
    """Bytes of one number; 1 for the types that numpy has not, which are of 8 bits or fewer."""
    return np.dtype(DTYPES[code]).itemsize if code in DTYPES else 1


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def copy_beside(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, generation settings, licence, sentence-transformers' modules and model code."""
    for path in _beside(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _beside(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _OURS:
            if path.suffix in _BESIDE or path.name.upper().startswith("LICENSE"):
                yield path
        elif path.is_dir() and (source / "modules.json").is_file() and (path / "config.json").is_file():
            yield path / "config.json"
