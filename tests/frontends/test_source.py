"""Guessing what a bare graph is a model of; imports that stay light."""

import subprocess
import sys

import pytest

from tests.frontends import tiny


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [
        ("int64[b, s] input_ids, int64[b, s] attention_mask", "float[b, s, 32] logits", "causal-lm"),
        ("int64[b, s] input_ids", "float[b, 2] logits", "encoder"),
        ("int64[b, s] input_ids, int64[b, s] token_type_ids", "float[b, s, 32] logits", "encoder"),
        ("int64[b, s] input_ids", "float[b, s, 8] last_hidden_state", "encoder"),
        ("float[b, 3, 16, 16] image", "float[b, 10] y", "vision"),
        ("float[b, 80, 100] input_features", "float[b, 50, 8] y", "graph"),
        ("float[b, 3, 16, 16] left, float[b, 3, 16, 16] right", "float[b, 10] y", "graph"),
    ],
)
def test_kind(inputs: str, outputs: str, kind: str) -> None:
    assert tiny.source(inputs, outputs=outputs).kind == kind


def test_front_door_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qcompiler.frontends; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'; "
        "from qcompiler.frontends import open_source\n"
        "try: open_source(object())\n"
        "except Exception as e: assert type(e).__name__ == 'ModelError', e\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
