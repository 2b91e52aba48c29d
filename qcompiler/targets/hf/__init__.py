"""Target ``hf``: a Hugging Face folder with weights of 2, 4 or 8 bits as compressed-tensors packs them.

``AutoModel….from_pretrained(OUT / "hf")`` loads it where compressed-tensors is installed. Beside it lies the model.onnx
of target ``ort-cpu``, of the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompiler.capability import Capability
from qcompiler.core import Companion, Note, TargetError
from qcompiler.frontends.origin import Origin, origin_of
from qcompiler.graph.linear import Linear
from qcompiler.passes.judging import keep_float, quantized
from qcompiler.scheme import Scheme
from qcompiler.targets.base import Target, block_kernels
from qcompiler.targets.hf.files import Tensor, copy_beside, write_json, write_weights
from qcompiler.targets.hf.packing import FORMAT, Kind, quantization_config
from qcompiler.targets.hf.writeback import Before, module_of, write_back
from qcompiler.targets.lowered import Coverage, Lowered, coverage_of
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.nbits import BLOCK_SIZES

FOLDER = "hf"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class HuggingFace(Target):
    """Weights only, for models that came from a Hugging Face folder of safetensors."""

    name: ClassVar[str] = "hf"
    runs_graph: ClassVar[bool] = False

    def capability(self) -> Capability:
        """Integers in groups that divide the inputs, or by output channel; the groups are those of model.onnx."""
        kernels = block_kernels(FORMAT, ("float", "", False), dict.fromkeys((2, 4, 8), BLOCK_SIZES))
        return Capability(self.name, tuple(kernels), fixed_graph=True)

    def prepare(self, model: ir.Model, scheme: Scheme) -> None:
        """Leave in float what compressed-tensors cannot pack, and remember the graph.

        Raises:
            TargetError: the model came from no such folder, is quantized already, or nothing of it can be packed.
        """
        origin = origin_of(model.graph)
        if origin is None:
            raise TargetError(
                "target 'hf' writes the safetensors of a Hugging Face folder anew, and this model came from none: give "
                "the path of a folder that save_pretrained wrote, or choose another target."
            )
        if "quantization_config" in _config(origin):
            raise TargetError(
                f"target 'hf' cannot quantize {origin.folder}: its config.json says it is quantized already."
            )
        kinds: dict[str, Kind] = {}
        refused, modules = {}, set()
        for linear in quantized(model, scheme):
            spec = scheme.weight_of(linear.name)
            why = _refusal(linear, origin, spec.group_size)
            if why is None:
                size = spec.group_size if spec.group_size is not None and spec.group_size < linear.in_features else None
                kinds[linear.name] = Kind(spec.bits, spec.symmetric, size)
                modules.add(module_of(linear, origin))
            else:
                refused[linear.name] = why
                keep_float(linear.matmul, why)
        if not kinds:
            why = "; ".join(dict.fromkeys(refused.values())) or "the scheme leaves all Linears in float"
            raise TargetError(f"target 'hf' has nothing to pack: {why}.")
        quantization_config(kinds, [], dense=bool(modules & origin.subclassed))
        Before.leave(model.graph)

    def lower(self, model: ir.Model) -> Lowered:
        """Find the parameters of the graph's weights; the graph itself becomes that of target ``ort-cpu``."""
        origin = origin_of(model.graph)
        assert origin is not None
        found = write_back(model, origin)
        ignore = sorted(origin.linears - set(found.kinds))
        dense = bool(origin.subclassed & set(found.kinds))
        config = {**_config(origin), "quantization_config": quantization_config(found.kinds, ignore, dense)}
        if found.untied:
            _untie(config)
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = _dtype(origin)
        notes = [Note(name, FORMAT, str(found.kinds[module])) for name, module in found.modules.items()]
        nodes = OrtCpu().lower(model).nodes
        return Lowered(nodes, tuple(notes), companion=Written(origin.folder, found.tensors, config))

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """None: transformers multiplies in float what it has unpacked."""
        return coverage_of(canonical, lambda name: (FORMAT if name in lowered.nodes else "float", False))

    def companion(self, folder: Path) -> Companion | None:
        return Saved(folder / FOLDER)


def _refusal(linear: Linear, origin: Origin, group_size: int | None) -> str | None:
    """Why compressed-tensors cannot hold this Linear's weight, or None."""
    if module_of(linear, origin) is None:
        return "compressed-tensors packs torch.nn.Linear, and this weight is that of another module"
    if group_size is not None and group_size < linear.in_features and linear.in_features % group_size:
        return f"compressed-tensors has no groups of {group_size} that do not divide the {linear.in_features} inputs"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A folder that is in memory, or in the source's files.

    Attributes:
        source: the folder that tokenizer and the like are copied from.
        tensors: what the weights' files hold.
        config: what config.json says.
    """

    source: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``folder / FOLDER``, one tensor in memory at a time."""
        made = folder / FOLDER
        made.mkdir()
        copy_beside(self.source, made)
        write_json(made / "config.json", self.config)
        write_weights(made, self.tensors)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A folder that was saved."""

    path: Path

    def save(self, folder: Path) -> None:
        """Copy it."""
        shutil.copytree(self.path, folder / FOLDER)


def _config(origin: Origin) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((origin.folder / "config.json").read_text(encoding="utf-8"))
    return config


def _untie(config: dict[str, Any]) -> None:
    """The head has a weight of its own, whatever part of the configuration says otherwise."""
    for part in config.values():
        if isinstance(part, dict) and part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False


def _dtype(origin: Origin) -> str:
    """The type of most of the source's numbers: left unsaid, loaders go by a file's first tensor."""
    sizes = dict.fromkeys(_DTYPES, 0)
    for entry in origin.entries.values():
        if entry.code in sizes:
            sizes[entry.code] += entry.nbytes
    return _DTYPES[max(sizes, key=lambda code: sizes[code])]
