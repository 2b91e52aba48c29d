"""Hugging Face models: which inputs and outputs the graph gets, and how to make the model traceable."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qcompiler.core import ModelError, Note
from qcompiler.frontends.hf_fake import Weights
from qcompiler.frontends.hf_origin import describe
from qcompiler.frontends.hf_pooling import Pooling
from qcompiler.frontends.origin import leave_origin
from qcompiler.frontends.source import Kind, Source
from qcompiler.frontends.torch_export import capture, evaluation, first_line, silent, to_onnx, to_scratch
from qcompiler.frontends.torch_module import as_call, auto_shapes, static_notes, user_inputs

_BATCH, _SEQUENCE = 2, 12
_NOT_OUTPUTS = {
    "loss",
    "past_key_values",
    "hidden_states",
    "attentions",
    "cross_attentions",
    "router_logits",
    "aux_loss",
}
_SYMBOLS = {0: "batch", 1: "sequence"}


def open_pretrained(
    model: Any,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    *,
    name: str | None = None,
    folder: Path | None = None,
    sha256: str | None = None,
    pooling: Pooling | None = None,
    weights: Weights | None = None,
    files: Sequence[Path] = (),
) -> Source:
    """Trace a transformers PreTrainedModel; batch and sequence are dynamic.

    Args:
        model: it is left as it was. Of an encoder-decoder the encoder is taken.
        example_inputs: dict or tuple (in the order of ``forward``); None: random ones that fit the config.
        dynamic_shapes: an entry for each input, in order or by name; None: batch and sequence.
        name, folder, sha256: of the folder it was loaded from.
        pooling: add an output ``sentence_embedding`` (sentence-transformers).
        weights: where the numbers of a model made without them lie; they stay there.
        files: the safetensors files of ``folder``: the graph is told where its parameters lie.

    Raises:
        Unbound: ``weights`` lack a parameter.
        ModelError: no example inputs can be made for this model, or it cannot be traced or exported.
    """
    notes: list[Note] = []
    name = name or type(model).__name__
    kind = _kind(model)
    whole, model = model, _encoder(model, notes)
    examples = _named(model, example_inputs) if example_inputs is not None else _examples(model)
    with _single_pass(model) as constants:
        wrapper = _Wrapper(model, tuple(examples), constants, pooling)
        wrapper.probe(tuple(examples.values()), notes)
        graph = _export(wrapper, tuple(examples.values()), dynamic_shapes, notes)
    if weights is not None:
        assert sha256 is not None
        weights.bind(graph.graph, model)
    else:
        exported = to_scratch(graph)
        graph, sha256 = exported.model, sha256 or exported.sha256
    if folder is not None and files:
        leave_origin(graph.graph, describe(whole, model, folder, files))
    return Source(graph, name, kind, sha256, folder=folder, notes=tuple(notes))


class _Wrapper(torch.nn.Module):
    """A model whose inputs are positional and whose outputs are a tuple of the tensors that are worth keeping."""

    def __init__(self, model: Any, inputs: tuple[str, ...], constants: dict[str, Any], pooling: Pooling | None) -> None:
        super().__init__()
        self.wrapped = model
        self.inputs = inputs
        self.outputs: tuple[str, ...] = ()
        self._constants = constants
        self._pooling = pooling

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = dict(zip(self.inputs, tensors, strict=True))
        result = self.wrapped(**feeds, **self._constants)
        kept = tuple(result[name] for name in self.outputs)
        if self._pooling is not None:
            kept += (self._pooling(result["last_hidden_state"], feeds["attention_mask"]),)
        return kept

    def output_names(self) -> list[str]:
        return [*self.outputs, *(["sentence_embedding"] if self._pooling is not None else [])]

    def probe(self, examples: tuple[torch.Tensor, ...], notes: list[Note]) -> None:
        """Run once to learn which outputs there are.

        The pooler of an encoder is left out where hidden states are there: sentence embeddings do not use it, and its
        weights are often missing from the files.

        Raises:
            ModelError: the model does not run on these inputs.
        """
        try:
            with silent(), torch.no_grad(), evaluation(self.wrapped):
                result = self.wrapped(**dict(zip(self.inputs, examples, strict=True)), **self._constants)
        except Exception as error:
            raise ModelError(
                f"{type(self.wrapped).__name__} does not run on {', '.join(self.inputs)}: {first_line(error)}: "
                "pass example_inputs that it runs on."
            ) from error
        tensors = [k for k, v in result.items() if isinstance(v, torch.Tensor) and k not in _NOT_OUTPUTS]
        if "last_hidden_state" in tensors and "pooler_output" in tensors:
            tensors.remove("pooler_output")
            notes.append(Note("pooler_output", "left out", "last_hidden_state is the encoder's result"))
        if self._pooling is not None and "last_hidden_state" not in tensors:
            notes.append(Note("sentence_embedding", "left out", "the model returns no last_hidden_state to pool"))
            self._pooling = None
        self.outputs = tuple(tensors)


def _export(wrapper: _Wrapper, examples: tuple[Any, ...], dynamic_shapes: Any, notes: list[Note]) -> ir.Model:
    model = wrapper.wrapped
    if isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = [dynamic_shapes.get(name) for name in wrapper.inputs]
    shapes = (auto_shapes(examples, {}) if dynamic_shapes is None else tuple(dynamic_shapes),)

    def run() -> tuple[ir.Model, tuple[Note, ...]]:
        program = capture(wrapper, examples, {}, shapes)
        symbols = {}
        for tensor in user_inputs(program).values():
            for axis, size in enumerate(tensor.shape):
                if axis in _SYMBOLS and not is_concrete_int(size):
                    symbols[str(size)] = _SYMBOLS[axis]
        exported = to_onnx(
            program,
            what=type(model).__name__,
            input_names=wrapper.inputs,
            output_names=wrapper.output_names(),
            prefix="wrapped.",
            symbols=symbols,
        )
        return exported, static_notes(program, wrapper.inputs) if dynamic_shapes is None else ()

    try:
        exported, static = run()
    except ModelError as error:
        # T5's position bias does not go through SDPA's export; plain matmul and softmax do.
        before = model.config._attn_implementation
        if before == "eager":
            raise
        with silent():
            model.set_attn_implementation("eager")
        try:
            exported, static = run()
        except ModelError:
            raise error from None
        finally:
            with silent():
                model.set_attn_implementation(before)
        notes.append(Note(type(model).__name__, "exported with eager attention", f"{before}: {error}"))
    notes.extend(static)
    return exported


@contextlib.contextmanager
def _single_pass(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments for one pass without a cache, and experts in the only form that exports, for as long as this lasts."""
    parameters = inspect.signature(model.forward).parameters
    constants: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    constants["return_dict"] = True
    before = model.get_experts_implementation() if model._can_set_experts_implementation() else None
    if before is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield constants
    finally:
        if before is not None:
            model.set_experts_implementation(before)


def _kind(model: Any) -> Kind:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    if type(model).__name__ in causal.values() and model.can_generate():
        return "causal-lm"
    return {"input_ids": "encoder", "pixel_values": "vision"}.get(model.main_input_name, "graph")  # type: ignore[return-value]


def _encoder(model: Any, notes: list[Note]) -> Any:
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return model
    encoder = model.get_encoder()
    why = f"{type(model).__name__} is an encoder-decoder, and only its encoder runs in one pass"
    notes.append(Note(type(encoder).__name__, "the encoder is taken", why))
    return encoder


def _named(model: Any, example_inputs: Any) -> dict[str, torch.Tensor]:
    args, kwargs = as_call(example_inputs)
    positional = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
    return {name: value for name, value in {**positional, **kwargs}.items() if isinstance(value, torch.Tensor)}


def _examples(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs of the shapes that the config tells; sizes that differ from each other and from 1."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    main = model.main_input_name
    if main == "input_ids":
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or _SEQUENCE
        shape = (_BATCH, min(_SEQUENCE, longest))
        ids = torch.randint(0, text.vocab_size, shape, generator=generator)
        ids[ids == getattr(text, "pad_token_id", None)] = text.vocab_size - 1
        examples = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}
        parameters = inspect.signature(model.forward).parameters
        if "token_type_ids" in parameters and getattr(text, "type_vocab_size", 0) > 1:
            examples["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        return examples
    if main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        channels = getattr(config, "num_channels", 3)
        return {main: torch.randn((_BATCH, channels, *size), generator=generator)}
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper's second convolution halves the frames.
        frames = (_BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {main: torch.randn(frames, generator=generator)}
    raise ModelError(f"no example inputs can be derived for {type(model).__name__} ({main}): pass example_inputs.")
