"""Real models through the front door: exactness, the tokenization of quoted perplexities, and what opening costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.frontends import open_data, open_source
from qcompiler.graph.run import Runner
from tests import families, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _perplexity(source: Any, batches: Any) -> float:
    """exp of the mean next-token cross-entropy over all windows, float64."""
    runner = Runner(source.model)
    total, count = 0.0, 0
    for batch in batches:
        logits = runner(batch)["logits"][:, :-1]
        targets = batch["input_ids"][:, 1:]
        top = logits.max(-1, keepdims=True)
        normalizer = np.log(np.exp(logits - top).sum(-1, dtype=np.float64)) + top[..., 0]
        total += float((normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum())
        count += targets.size
    return float(np.exp(total / count))


def test_stories260k(stories260k: Path) -> None:
    source = open_source(stories260k)
    with families.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    batches = open_data(models.data("tinystories/sample.txt"), source, seq_len=128, limit=3, batch_size=2)
    (first, _) = batches
    assert first["input_ids"][0, 0] == model.config.bos_token_id
    with torch.no_grad():
        want = model(torch.from_numpy(first["input_ids"])).logits.numpy()
    assert np.abs(Runner(source.model)(first)["logits"] - want).max() < 1e-4
    assert _perplexity(source, batches) < 8


@pytest.mark.slow
def test_minilm_embeds_as_torch_does(minilm: Path) -> None:
    source = open_source(minilm)
    assert [value.name for value in source.model.graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    texts = ["A man is playing a guitar.", "The cat sat on the mat, and then it slept for a long time.", "Yes"]
    (batch,) = open_data(texts, source)
    with families.quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
        model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    want = tokenizer(texts, padding=True, return_tensors="pt")
    assert all(np.array_equal(batch[name], tensor.numpy()) for name, tensor in want.items())
    got = Runner(source.model)(batch)
    with torch.no_grad():
        hidden = model(**want).last_hidden_state.numpy()
    rows = batch["attention_mask"] == 1
    assert np.abs(got["last_hidden_state"][rows] - hidden[rows]).max() < 2e-5
    assert np.abs(np.linalg.norm(got["sentence_embedding"], axis=1) - 1).max() < 1e-5


@pytest.mark.slow
def test_opening_minilm_is_cheap(minilm: Path) -> None:
    code = (
        "import json, resource, time, torch, transformers, onnxruntime, sys\n"
        "from transformers.models.bert import modeling_bert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = peak(), time.process_time()\n"
        "from qcompiler.frontends import open_source\n"
        f"source = open_source({str(minilm)!r})\n"
        "print(json.dumps([time.process_time() - start, peak() - before]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(run.stdout)
    assert run.stdout.count("\n") == 1  # nothing else is printed
    assert seconds < 20, f"{seconds} CPU-seconds"
    assert megabytes < 350, f"{megabytes} MB above the imports"


@pytest.mark.slow
def test_smollm2_perplexity_is_the_quoted_one(smollm2: Path) -> None:
    source = open_source(smollm2)
    assert source.kind == "causal-lm"
    batches = open_data(models.data("wikitext2/test.txt"), source, limit=16, batch_size=1)
    assert (batches.samples, next(iter(batches))["input_ids"].shape) == (16, (1, 512))
    assert _perplexity(source, batches) == pytest.approx(29.60, abs=0.01)
