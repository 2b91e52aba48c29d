"""Hugging Face folders: config.json beside safetensors."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.core import ModelError, Note
from qcompiler.frontends.hf_pooling import Pooling, read_pooling, transformer_folder
from qcompiler.frontends.source import Source, hash_files

if TYPE_CHECKING:
    from qcompiler.frontends.hf_fake import Weights


def open_folder(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """Trace a model folder, as float32 with the head that its ``architectures`` field names; its weights stay there.

    What cannot be traced without its weights is loaded whole, with a note that says why.

    Args:
        folder: holds config.json and ``*.safetensors``; with a modules.json, sentence-transformers' pooling becomes the
            output ``sentence_embedding``.
        trust_remote_code: run Python code that comes with the folder.

    Raises:
        ModelError: config or weights are missing or damaged, transformers does not know the architecture, the folder
            needs its own code and that is not allowed, or the model cannot be traced.
    """
    root, folder = folder, transformer_folder(folder)
    config = _read_config(folder)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"opening the Hugging Face folder {root} needs torch and transformers ({error}): "
            "pip install 'qcompiler[torch]'."
        ) from error
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise ModelError(f"{folder} holds a config.json but no weights (*.safetensors).")
    pooling, notes = read_pooling(root)
    cls = _model_class(config, folder, trust_remote_code)
    described = [p for p in (folder / "config.json", root / "modules.json") if p.is_file()]
    opened = _Folder(root, folder, cls, weights, hash_files([*described, *weights]), pooling, trust_remote_code)
    source = opened.traced()
    gc.collect()
    return dataclasses.replace(source, notes=notes + source.notes)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder whose files are there, and how to trace its model."""

    root: Path
    folder: Path
    cls: Any
    weights: Sequence[Path]
    sha256: str
    pooling: Pooling | None
    trust_remote_code: bool

    def traced(self) -> Source:
        from qcompiler.frontends.hf_fake import Unbound, Weights, make
        from qcompiler.frontends.torch_export import first_line

        try:
            if self.weights[0].suffix != ".safetensors":
                raise Unbound("its weights are in no safetensors file")
            model = make(self.cls, self.folder, self.trust_remote_code)
            return self._open(model, Weights(model, self.weights))
        except Unbound as error:
            why = str(error)
        except Exception as error:  # a model that computes with its weights while it is made or traced
            why = first_line(error)
        source = self._loaded()
        note = Note(self.root.resolve().name, "loaded whole", f"it cannot be traced without its weights: {why}")
        return dataclasses.replace(source, notes=(*source.notes, note))

    def _loaded(self) -> Source:
        import torch

        from qcompiler.frontends.torch_export import first_line, silent

        try:
            with silent():
                model, info = self.cls.from_pretrained(
                    self.folder,
                    dtype=torch.float32,
                    trust_remote_code=self.trust_remote_code,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:
            raise ModelError(f"{self.folder} cannot be loaded: {first_line(error)}") from error
        source = self._open(model)
        missing = sorted(set(info["missing_keys"]) & set(source.model.graph.initializers))
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} weights of {self.cls.__name__}, among them {missing[0]!r}."
            )
        return source

    def _open(self, model: Any, weights: Weights | None = None) -> Source:
        from qcompiler.frontends.hf_model import open_pretrained

        name = self.root.resolve().name
        return open_pretrained(
            model,
            name=name,
            folder=self.folder,
            sha256=self.sha256,
            pooling=self.pooling,
            weights=weights,
            files=[path for path in self.weights if path.suffix == ".safetensors"],
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a Hugging Face folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a model configuration.")
    return config


def _model_class(config: dict[str, Any], folder: Path, trust_remote_code: bool) -> Any:
    """The class that ``architectures`` names, in transformers or, where that is allowed, in the folder."""
    import transformers

    names = config.get("architectures") or []
    model_type = config.get("model_type")
    for name in names:
        found = getattr(transformers, name, None) or _inner_class(model_type, name)
        if found is not None and not (config.get("auto_map") and trust_remote_code):
            return found
    remote = {key: value for key, value in (config.get("auto_map") or {}).items() if key.startswith("AutoModel")}
    if remote:
        if not trust_remote_code:
            raise ModelError(
                f"{folder} needs its own Python code ({next(iter(remote.values()))}): "
                "pass trust_remote_code=True if you trust it."
            )
        named = [key for key, value in remote.items() if value.rsplit(".", 1)[-1] in names]
        return getattr(transformers, (named or list(remote))[0])
    if names:
        raise ModelError(
            f"{folder} is of architecture {names[0]!r}, which transformers {transformers.__version__} lacks."
        )
    if model_type not in transformers.CONFIG_MAPPING:
        what = f"model_type {model_type!r}, which transformers lacks" if model_type else "no model_type"
        raise ModelError(f"{folder / 'config.json'} names no architectures and has {what}.")
    return transformers.AutoModel


def _inner_class(model_type: str | None, name: str) -> Any:
    """Parts such as WhisperEncoder are saved under their own name, but live in the model's module only."""
    module = str(model_type).replace("-", "_")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name, None)
    except ImportError:
        return None
