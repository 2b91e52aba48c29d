"""Hugging Face folders: config.json beside safetensors."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
from pathlib import Path
from typing import Any

from qcompiler.core import ModelError
from qcompiler.frontends.hf_pooling import read_pooling, transformer_folder
from qcompiler.frontends.source import Source, hash_files


def open_folder(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """Load a model folder in float32 with the head that its ``architectures`` field names, and trace it.

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
        from qcompiler.frontends import hf_model
        from qcompiler.frontends.torch_export import first_line, silent
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
    try:
        with silent():
            import torch

            model, info = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    described = [p for p in (folder / "config.json", root / "modules.json") if p.is_file()]
    source = hf_model.open_pretrained(
        model, name=root.resolve().name, folder=folder, sha256=hash_files([*described, *weights]), pooling=pooling
    )
    del model
    gc.collect()
    missing = sorted(set(info["missing_keys"]) & set(source.model.graph.initializers))
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights of {cls.__name__}, among them {missing[0]!r}.")
    return dataclasses.replace(source, notes=notes + source.notes)


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
