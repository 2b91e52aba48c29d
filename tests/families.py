"""Tiny two-layer models of the architectures that qcompiler is tested on: random weights, exported once, cached.

``FAMILIES[name]()`` builds the torch module; ``exported(name)`` is its dynamo export (``optimize=False``, opset 21);
``feeds(name, batch, seq, seed)`` are inputs for either. Weights come from a seeded generator, norms and biases
included: a model whose norms are all ones and whose biases are zero would hide half of all mistakes.

Every module takes its inputs by position in the order of ``INPUTS[name]`` and returns one tensor, ``OUTPUT[name]``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    import torch

HIDDEN = 64
HEADS = 4
VOCABULARY = 128
IMAGE = 16
FRAMES = 32
MELS = 16


def _decoder(config: str, head: str, **options: Any) -> Callable[[], torch.nn.Module]:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: _build(config, head, {**base, **options})


def _other(config: str, head: str, **options: Any) -> Callable[[], torch.nn.Module]:
    return lambda: _build(config, head, options)


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
}

FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": _decoder("LlamaConfig", "LlamaForCausalLM"),
    "mistral": _decoder("MistralConfig", "MistralForCausalLM", sliding_window=None),
    "opt": _other(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        word_embed_proj_dim=HIDDEN,
        **_IDS,
    ),
    "bert": _other("BertConfig", "BertModel", **_ENCODER),
    "gpt2": _other(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=HEADS,
        n_positions=128,
        **_IDS,
    ),
    "gemma2": _decoder("Gemma2Config", "Gemma2ForCausalLM", head_dim=16, query_pre_attn_scalar=16, sliding_window=64),
    "qwen2": _decoder("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=16),
    "phi3": _decoder("Phi3Config", "Phi3ForCausalLM"),
    "cohere": _decoder("CohereConfig", "CohereForCausalLM"),
    "falcon": _other(
        "FalconConfig",
        "FalconForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
        **_IDS,
    ),
    "gpt_neox": _decoder("GPTNeoXConfig", "GPTNeoXForCausalLM", rotary_pct=0.5),
    "bloom": _other(
        "BloomConfig", "BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=HEADS, **_IDS
    ),
    "vit": _other(
        "ViTConfig",
        "ViTModel",
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=IMAGE,
        patch_size=4,
    ),
    "distilbert": _other(
        "DistilBertConfig",
        "DistilBertModel",
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        hidden_dim=2 * HIDDEN,
        n_layers=2,
        n_heads=HEADS,
        max_position_embeddings=128,
    ),
    "t5_encoder": _other(
        "T5Config",
        "T5EncoderModel",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_ff=2 * HIDDEN,
        d_kv=16,
        num_layers=2,
        num_heads=HEADS,
        attn_implementation="eager",
    ),
    "whisper_encoder": _other(
        "WhisperConfig",
        "WhisperEncoder",
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=2 * HIDDEN,
        num_mel_bins=MELS,
        max_source_positions=FRAMES // 2,
        **_IDS,
    ),
    "mixtral": _decoder("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
}

_TEXT = ("input_ids", "attention_mask")
INPUTS: dict[str, tuple[str, ...]] = {
    name: {"vit": ("pixel_values",), "whisper_encoder": ("input_features",)}.get(name, _TEXT) for name in FAMILIES
}
_HIDDEN_STATE = {"bert", "vit", "distilbert", "t5_encoder", "whisper_encoder"}
OUTPUT: dict[str, str] = {name: "last_hidden_state" if name in _HIDDEN_STATE else "logits" for name in FAMILIES}
CAUSAL = tuple(name for name in FAMILIES if OUTPUT[name] == "logits")


def _build(config_name: str, class_name: str, options: dict[str, Any]) -> torch.nn.Module:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config_name)(**options)
    if class_name == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as cls
    else:
        cls = getattr(transformers, class_name)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    torch.manual_seed(0)
    model = cls(config).eval().float()
    if class_name == "MixtralForCausalLM":
        model.set_experts_implementation("batched_mm")
    _randomize(model, seed=int(hashlib.sha256(class_name.encode()).hexdigest()[:8], 16))
    return _single_output(model)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights of a size that keeps activations near 1; norms in [0.5, 1.5] with biases; no zero anywhere."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                fan = parameter.shape[-1] if parameter.ndim == 2 else int(np.prod(parameter.shape[1:]))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, module in sorted(model.named_modules()):
            weight = getattr(module, "weight", None)
            if "norm" in (type(module).__name__ + name).lower() and weight is not None and weight.ndim == 1:
                offset = 0.0 if "Gemma" in type(module).__name__ else 1.0  # Gemma multiplies by 1 + weight
                weight.copy_(torch.rand(weight.shape, generator=generator) + offset - 0.5)


def _single_output(model: Any) -> torch.nn.Module:
    """The model as a module that returns one tensor; parameters keep their names behind a ``model.`` prefix."""
    import torch

    class Text(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return _first(self.model(input_ids=input_ids, attention_mask=attention_mask))

    class Vision(Text):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return _first(self.model(pixel_values=pixel_values))

    class Audio(Text):
        def forward(self, input_features: torch.Tensor) -> Any:
            return _first(self.model(input_features=input_features))

    main_input = model.main_input_name
    return {"pixel_values": Vision, "input_features": Audio}.get(main_input, Text)(model).eval()


def _first(output: Any) -> Any:
    return output.logits if "logits" in output else output.last_hidden_state


def feeds(name: str, batch: int = 2, seq: int = 16, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a family; from the second sample on, rows end in padding (right side), one token more for each.

    ``seq`` says nothing to vit ([batch, 3, 16, 16]) and whisper_encoder ([batch, 16, 32]).
    """
    rng = np.random.default_rng(seed)
    if name == "vit":
        return {"pixel_values": rng.standard_normal((batch, 3, IMAGE, IMAGE), dtype=np.float32)}
    if name == "whisper_encoder":
        return {"input_features": rng.standard_normal((batch, MELS, FRAMES), dtype=np.float32)}
    lengths = np.maximum(seq - np.arange(batch), 1)
    mask = (np.arange(seq)[None, :] < lengths[:, None]).astype(np.int64)
    ids = rng.integers(3, VOCABULARY, (batch, seq), dtype=np.int64)
    return {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}


def cache_folder() -> Path:
    """Where exports are kept: one folder for each set of versions and each version of this file."""
    versions = "-".join(
        importlib.metadata.version(p) for p in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
    )
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    root = os.environ.get("QCOMPILER_TEST_CACHE")
    return (Path(root) if root else Path.home() / ".cache/qcompiler/test-families") / f"{versions}-{recipe}"


def exported(name: str) -> Path:
    """The family's ``.onnx`` (weights inside), exported at the first call on this machine. Do not write to it."""
    pytest.importorskip("torch")
    path = cache_folder() / f"{name}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=path.parent))
        try:
            with quiet():
                _export(name, work / "model.onnx")
            (work / "model.onnx").replace(path)  # atomic: a second process sees a whole file or none
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _export(name: str, path: Path) -> None:
    import torch

    examples = tuple(torch.from_numpy(array) for array in feeds(name, batch=2, seq=12).values())
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic, 1: dynamic} if INPUTS[name] == _TEXT else {0: dynamic}
    with torch.no_grad():
        program = torch.onnx.export(
            FAMILIES[name](),
            examples,
            dynamo=True,
            optimize=False,
            opset_version=21,
            verbose=False,
            input_names=list(INPUTS[name]),
            output_names=[OUTPUT[name]],
            dynamic_shapes=tuple(dict(axes) for _ in examples),
        )
    assert program is not None
    program.save(str(path), external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No prints, warnings or log lines: the dynamo exporter emits all three."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
