"""``.onnx`` files as other exporters leave them: legacy and default dynamo exports of torch, onnxruntime.transformers.

``FILES[name]`` says how a file is made; ``foreign(name)`` builds it at the first call on this machine and keeps it
beside the exports of ``tests.families``, whose tiny models and inputs these are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests import families


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a file comes to be.

    Attributes:
        family: the tiny model of tests.families.
        opset: what the exporter is asked for.
        exporter: "legacy" (TorchScript), "dynamo" (with its default optimizer), "raw" (dynamo without), or
            "cache": raw, a decoder whose keys and values come in and go out.
        optimizer: what happens to the export then: model type and options of onnxruntime.transformers; or None.
        attention: attention implementation of transformers.
    """

    family: str
    opset: int
    exporter: str = "legacy"
    optimizer: tuple[str, dict[str, Any]] | None = None
    attention: str = "eager"


_PYTHON_FUSIONS: dict[str, Any] = {"opt_level": 0}
_ALL_FUSIONS: dict[str, Any] = {"opt_level": 99, "only_onnxruntime": True}

FILES: dict[str, Foreign] = {
    "bert-legacy-11": Foreign("bert", 11),
    "bert-legacy-13": Foreign("bert", 13),
    "distilbert-legacy-17": Foreign("distilbert", 17, attention="sdpa"),
    "gpt2-legacy-13": Foreign("gpt2", 13),
    "opt-legacy-17": Foreign("opt", 17),
    "vit-legacy-11": Foreign("vit", 11),
    "llama-legacy-17": Foreign("llama", 17),
    "t5-legacy-13": Foreign("t5_encoder", 13),
    "bert-dynamo-18": Foreign("bert", 18, "dynamo", attention="sdpa"),
    "gpt2-dynamo-20": Foreign("gpt2", 20, "dynamo", attention="sdpa"),
    "llama-dynamo-20": Foreign("llama", 20, "dynamo", attention="sdpa"),
    "llama-raw-23": Foreign("llama", 23, "raw", attention="sdpa"),
    "bert-raw-22": Foreign("bert", 22, "raw", attention="sdpa"),
    "llama-cache-21": Foreign("llama", 21, "cache", attention="sdpa"),
    "bert-fused-python": Foreign("bert", 13, optimizer=("bert", _PYTHON_FUSIONS)),
    "bert-fused-ort": Foreign("bert", 17, optimizer=("bert", _ALL_FUSIONS)),
    "gpt2-fused-ort": Foreign("gpt2", 17, optimizer=("gpt2", _ALL_FUSIONS)),
    "vit-fused-python": Foreign("vit", 17, optimizer=("vit", _PYTHON_FUSIONS)),
    "distilbert-fused-python": Foreign("distilbert", 13, optimizer=("bert", _PYTHON_FUSIONS)),
    "llama-fused-ort": Foreign("llama", 17, optimizer=("bert", _ALL_FUSIONS)),
}


def feeds(name: str, batch: int = 2, seq: int = 16, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a file; a cache holds five tokens before these."""
    found = families.feeds(FILES[name].family, batch, seq, seed)
    return _with_past(found) if FILES[name].exporter == "cache" else found


def foreign(name: str) -> Path:
    """The file, built at the first call on this machine. Do not write to it."""
    pytest.importorskip("torch")
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = families.cache_folder() / f"foreign-{recipe}" / f"{name}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=path.parent))
        try:
            with families.quiet():
                _build(FILES[name], work / "model.onnx")
            (work / "model.onnx").replace(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _build(recipe: Foreign, path: Path) -> None:
    import torch

    module: Any = families.FAMILIES[recipe.family]()
    if hasattr(module.model, "set_attn_implementation"):
        module.model.set_attn_implementation(recipe.attention)
    examples = tuple(torch.from_numpy(array) for array in families.feeds(recipe.family, batch=2, seq=12).values())
    with torch.no_grad():
        _EXPORTERS[recipe.exporter](recipe, module, examples, path)
    if recipe.optimizer is not None:
        _fuse(recipe, path)


def _legacy(recipe: Foreign, module: Any, examples: tuple[Any, ...], path: Path) -> None:
    import torch

    names = list(families.INPUTS[recipe.family])
    output = families.OUTPUT[recipe.family]
    axes = {0: "batch", 1: "sequence"} if "input_ids" in names else {0: "batch"}
    torch.onnx.export(
        module,
        examples,
        str(path),
        dynamo=False,
        opset_version=recipe.opset,
        input_names=names,
        output_names=[output],
        dynamic_axes=dict.fromkeys([*names, output], axes),
    )


def _dynamo(recipe: Foreign, module: Any, examples: tuple[Any, ...], path: Path) -> None:
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    names = families.INPUTS[recipe.family]
    axes = {0: dynamic, 1: dynamic} if "input_ids" in names else {0: dynamic}
    program = torch.onnx.export(
        module,
        examples,
        dynamo=True,
        optimize=recipe.exporter == "dynamo",
        opset_version=recipe.opset,
        verbose=False,
        input_names=list(names),
        output_names=[families.OUTPUT[recipe.family]],
        dynamic_shapes=tuple(dict(axes) for _ in examples),
    )
    assert program is not None
    program.save(str(path), external_data=False)


PAST = ("past_key_0", "past_value_0", "past_key_1", "past_value_1")


def _with_past(found: dict[str, npt.NDArray[Any]], length: int = 5) -> dict[str, npt.NDArray[Any]]:
    batch = len(found["attention_mask"])
    seen = np.ones((batch, length), np.int64)
    found["attention_mask"] = np.concatenate([seen, found["attention_mask"]], axis=1)
    rng = np.random.default_rng(7)
    return found | {name: rng.standard_normal((batch, 2, length, 16), dtype=np.float32) for name in PAST}


def _cache(recipe: Foreign, module: Any, examples: tuple[Any, ...], path: Path) -> None:
    import torch
    from transformers import DynamicCache

    config = module.model.config
    config.use_cache = True

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module.model

        def forward(self, input_ids: Any, attention_mask: Any, k0: Any, v0: Any, k1: Any, v1: Any) -> tuple[Any, ...]:
            cache = DynamicCache(config=config)
            cache.update(k0, v0, 0)
            cache.update(k1, v1, 1)
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )
            layers = output.past_key_values.layers
            return (output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))

    dynamic = torch.export.Dim.DYNAMIC
    inputs = _with_past(dict(zip(("input_ids", "attention_mask"), (t.numpy() for t in examples), strict=True)))
    program = torch.onnx.export(
        Step().eval(),
        tuple(torch.from_numpy(array) for array in inputs.values()),
        dynamo=True,
        optimize=False,
        opset_version=recipe.opset,
        verbose=False,
        input_names=list(inputs),
        output_names=["logits", *(name.replace("past", "present") for name in PAST)],
        dynamic_shapes=(*({0: dynamic, 1: dynamic},) * 2, *({0: dynamic, 2: dynamic},) * 4),
    )
    assert program is not None
    program.save(str(path), external_data=False)


_EXPORTERS: dict[str, Callable[[Foreign, Any, tuple[Any, ...], Path], None]] = {
    "legacy": _legacy,
    "dynamo": _dynamo,
    "raw": _dynamo,
    "cache": _cache,
}


def _fuse(recipe: Foreign, path: Path) -> None:
    from onnxruntime.transformers import optimizer

    assert recipe.optimizer is not None
    model_type, options = recipe.optimizer
    fused = optimizer.optimize_model(
        str(path), model_type=model_type, num_heads=families.HEADS, hidden_size=families.HIDDEN, **options
    )
    fused.save_model_to_file(str(path))


def relative_error(reference: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """max|a - b| / max|a|."""
    return float(np.abs(reference - other).max() / np.abs(reference).max())
