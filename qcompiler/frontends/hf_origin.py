"""Where the parameters of a traced transformers model lie: names in the graph, in the model and in the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qcompiler.frontends.origin import Origin
from qcompiler.frontends.safetensors_file import entries


def describe(model: Any, traced: torch.nn.Module, folder: Path, paths: Sequence[Path]) -> Origin:
    """Compare a model with its files.

    Args:
        model: the whole model, as the files know it.
        traced: the part of it that became the graph, or itself.
        folder: where its config.json lies.
        paths: its safetensors files.

    Raises:
        ModelError: a file cannot be read.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears = frozenset(modules)
    subclassed = frozenset(name for name, module in modules.items() if type(module) is not torch.nn.Linear)
    spellings: dict[int, list[str]] = {}
    state = _named(model)
    for name, tensor in state.items():
        spellings.setdefault(id(tensor), []).append(name)
    aliases = {
        number: tuple(sorted(names, key=lambda name: name.removesuffix(".weight") in linears))
        for number, names in spellings.items()
    }
    loaded = _Loader(model, state)
    found = {}
    for key, entry in entries(paths).items():
        parameter = loaded.name(key, entry.shape)
        found[key if parameter is None else aliases[id(state[parameter])][0]] = entry
    names = {name: aliases[id(tensor)] for name, tensor in _named(traced).items() if id(tensor) in aliases}
    return Origin(folder, names, found, linears, subclassed)


class _Loader:
    """How transformers finds the parameter that a tensor of the files is: names of older versions, of a bare model, or
    of one with a head.
    """

    def __init__(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping

        self._renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
        self._prefix, self._state = model.base_model_prefix, state

    def name(self, key: str, shape: tuple[int, ...]) -> str | None:
        """The parameter, or None: the model has none of that name and shape, or makes it from several tensors."""
        from transformers.core_model_loading import rename_source_key

        for renamings in (self._renamings, []):
            name, _ = rename_source_key(key, renamings, [], self._prefix, self._state)
            if name in self._state:
                return name if tuple(self._state[name].shape) == shape else None
        return None


def _named(module: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, tied ones under each of their names."""
    parameters, buffers = (find(remove_duplicate=False) for find in (module.named_parameters, module.named_buffers))
    return {**dict(parameters), **dict(buffers)}
