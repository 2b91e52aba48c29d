"""Real models hold the figures that README.md quotes: accuracy, coverage, memory. Times are for benchmarks/ to tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from benchmarks import protocol
from qcompiler.frontends import open_data, open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner, save_model
from qcompiler.runtime.evaluate import Metrics, evaluate
from qcompiler.targets.ort.capability import saturates
from tests import families, models

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
Run = Callable[[protocol.Feeds], np.ndarray]
Measure = Callable[[str], tuple[qcompiler.CompiledModel, Metrics]]


def plain(path: Path) -> Run:
    """The last hidden state, by a plain session without qcompiler."""
    session = protocol.one_thread_session(path)
    return lambda feeds: session.run(["last_hidden_state"], feeds)[0]


@pytest.fixture(scope="module")
def fp32(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM as one exported ``.onnx`` file."""
    path = tmp_path_factory.mktemp("minilm") / "fp32.onnx"
    with families.quiet():
        save_model(open_source(minilm).model, path)
    return path


@pytest.fixture(scope="module")
def w8a8(minilm: Path, fp32: Path) -> Path:
    models.data("stsb/dev.csv")
    calibration = protocol.encode(minilm, protocol.minilm_calibration())
    out = fp32.with_name("w8a8")
    compiled = qcompiler.compile(fp32, calibration=calibration, output=out, progress=False)
    assert compiled.report.coverage_body >= 0.97
    return out / "model.onnx"


@pytest.fixture(scope="module")
def hidden(minilm: Path) -> Callable[[Run], float]:
    """SQNR in dB of a run's last hidden state against torch in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    models.data("stsb/test.csv")
    batches = protocol.encode(minilm, protocol.minilm_evaluation(), pad_to=128)
    with families.quiet():
        model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    with torch.no_grad():
        reference = [model(**{k: torch.from_numpy(v) for k, v in f.items()}).last_hidden_state.numpy() for f in batches]
    masks = [feeds["attention_mask"] for feeds in batches]
    return lambda run: protocol.pooled_sqnr(reference, (run(feeds) for feeds in batches), masks)


def test_minilm_llm_int8(minilm: Path, fp32: Path, hidden: Callable[[Run], float], tmp_path: Path) -> None:
    """Measured: 28.1 dB, where the same int8 without the split has 22.4; weights of 7 bits lose some 4 dB."""
    calibration = protocol.encode(minilm, protocol.minilm_calibration())
    out = tmp_path / "out"
    compiled = qcompiler.compile(fp32, scheme="llm-int8", calibration=calibration, output=out, progress=False)
    split = [note.why for note in compiled.report.notes if note.what == "split"]
    assert 20 < len(split) <= 36
    assert hidden(plain(out / "model.onnx")) >= (22.5 if saturates() else 26.5)


def test_minilm_static(fp32: Path, w8a8: Path, hidden: Callable[[Run], float], tmp_path: Path) -> None:
    assert hidden(plain(fp32)) > 100
    sqnr = hidden(plain(w8a8))
    canonical = ir.load(fp32)  # in the raw export the peer would not find the weights behind their Transposes
    canonicalise(canonical)
    save_model(canonical, tmp_path / "canonical.onnx")
    with families.quiet():
        protocol.quantize_with_ort(tmp_path / "canonical.onnx", tmp_path / "ort.onnx", "dynamic", [])
    assert sqnr >= 23  # with the 7 bits of a machine without VNNI
    peer = hidden(plain(tmp_path / "ort.onnx"))
    assert 10 < peer <= sqnr - 5


def test_minilm_dynamic(minilm: Path, fp32: Path, hidden: Callable[[Run], float], tmp_path: Path) -> None:
    calibration = protocol.encode(minilm, protocol.minilm_calibration())
    qcompiler.compile(fp32, scheme="w8a8-dynamic", calibration=calibration, output=tmp_path / "out", progress=False)
    assert hidden(plain(tmp_path / "out/model.onnx")) >= 24


def test_minilm_in_four_bits(minilm: Path, hidden: Callable[[Run], float], tmp_path: Path) -> None:
    """From the folder, whose tokenizer turns the built-in text into samples. Measured: 19.8 dB."""
    calibration = protocol.encode(minilm, protocol.minilm_calibration())
    qcompiler.compile(
        minilm, scheme="w4a8{symmetric=false}", calibration=calibration, output=tmp_path / "out", progress=False
    )
    assert hidden(plain(tmp_path / "out/model.onnx")) >= 19


@pytest.mark.parametrize(("scheme", "bar"), [("w8a8-o3", 25.0), ("w8a8", 26.5), ("w8a8-dynamic", 28.8)])
def test_minilm_in_eight_bits(
    minilm: Path, fp32: Path, hidden: Callable[[Run], float], tmp_path: Path, scheme: str, bar: float
) -> None:
    """The fake-quant graph with all 8 bits of the weights, whatever this machine's integer products can hold."""
    calibration = protocol.encode(minilm, protocol.minilm_calibration())
    target = "ort-cpu{vnni=true}"
    qcompiler.compile(
        fp32, scheme=scheme, calibration=calibration, target=target, dump=tmp_path / "stages", progress=False
    )
    run = Runner(ir.load(max((tmp_path / "stages").iterdir()) / "model.onnx"))
    assert hidden(lambda feeds: run(feeds)["last_hidden_state"]) >= bar


def test_minilm_still_ranks_sentences(minilm: Path, fp32: Path, w8a8: Path) -> None:
    pytest.importorskip("scipy")
    want, have = (protocol.spearman_stsb(plain(path), minilm) for path in (fp32, w8a8))
    assert want > 0.8
    assert abs(want - have) <= 0.002


_PEAK = """
import json, sys
from pathlib import Path
import onnxruntime, qcompiler
from benchmarks import protocol
import qcompiler.frontends, qcompiler.targets.ort, qcompiler.targets.portable
from qcompiler.passes import PASSES, make_pass
for name in PASSES:
    make_pass(name, {})
before = protocol.peak_rss_mb()
model, tokenizer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sentences = (protocol.stsb("dev", 0) + protocol.stsb("test", 0))[:count]
data = protocol.encode(Path(tokenizer), sentences)
qcompiler.compile(model, calibration=data, progress=False)
print(json.dumps([before, protocol.peak_rss_mb()]))
"""


def peak_above_imports(model: Path, tokenizer: Path, samples: int) -> float:
    """Peak resident memory in MB of compiling in a process of its own, above the interpreter with its imports."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(model), str(tokenizer), str(samples)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    before, peak = json.loads(run.stdout)
    return float(peak - before)


def test_memory_is_bounded_and_does_not_grow_with_the_data(minilm: Path, fp32: Path) -> None:
    models.data("stsb/dev.csv")
    few, many = (peak_above_imports(fp32, minilm, samples) for samples in (128, 1280))
    assert few <= 700
    assert many <= 1.1 * few


@pytest.fixture(scope="module")
def wikitext(smollm2: Path) -> Measure:
    """Compile SmolLM2 by a scheme and compare it with the float model on 16 x 512 tokens."""
    source = open_source(smollm2)
    calibration = list(open_data(models.data("wikitext2/valid.txt"), source, limit=32, seq_len=512))
    windows = open_data(models.data("wikitext2/test.txt"), source, limit=16, seq_len=512)

    def measure(scheme: str) -> tuple[qcompiler.CompiledModel, Metrics]:
        compiled = qcompiler.compile(source.model, scheme=scheme, calibration=calibration, progress=False)
        return compiled, evaluate(compiled, source.model, windows)

    return measure


def test_smollm2_dynamic(wikitext: Measure) -> None:
    """A ratio over 8,192 tokens has a standard error of .002. Looser where weights keep 7 bits, without VNNI: so is the
    next; `benchmarks/smollm2.py` measured 1.005 and 1.002."""
    compiled, metrics = wikitext("w8a8-dynamic")
    assert metrics.reference_perplexity == pytest.approx(29.60, abs=0.01)
    assert metrics.perplexity <= (1.05 if saturates() else 1.01) * metrics.reference_perplexity
    assert compiled.report.coverage_body >= 0.97


def test_smollm2_static(wikitext: Measure) -> None:
    """Static where that is worth its time; the other sites say that they are per-token, and why."""
    compiled, metrics = wikitext("w8a8")
    assert metrics.perplexity <= (1.06 if saturates() else 1.01) * metrics.reference_perplexity
    assert compiled.report.coverage_body >= 0.99
    rows = compiled.report.rows
    per_token = {row.name for row in rows if "per_token" in row.activation}
    assert len(per_token) < len(rows)
    assert all("worth its time" in row.transform for row in rows if row.name in per_token)


def test_stories260k_goes_on_telling(stories260k: Path, tmp_path: Path) -> None:
    text = models.data("tinystories/sample.txt")
    source = open_source(stories260k)
    held_out = tmp_path / "held-out.txt"
    content = text.read_text(encoding="utf-8")
    held_out.write_text(content[len(content) // 2 :], encoding="utf-8")
    windows = open_data(held_out, source, limit=16, seq_len=256, batch_size=4)
    for scheme in ("w8a8", "w8a8-dynamic"):
        compiled = qcompiler.compile(
            stories260k, scheme=scheme, calibration=text, limit=16, seq_len=256, batch_size=4, progress=False
        )
        metrics = evaluate(compiled, source.model, windows)
        assert metrics.perplexity <= 1.01 * metrics.reference_perplexity
        assert compiled.report.coverage_body >= 0.97


SMILES = protocol.SMILES


def test_rxnmapper_calls_one_layer_twelve_times(rxnmapper: Path) -> None:
    """Calibrated on half of the molecules, compared on the other half; weights that layers share stay shared."""
    source = open_source(rxnmapper)
    compiled = qcompiler.compile(rxnmapper, calibration=SMILES[::2], progress=False)
    metrics = evaluate(compiled, source.model, open_data(SMILES[1::2], source))
    assert metrics.outputs["logits"].sqnr_db >= 32
    assert metrics.outputs["logits"].top1 >= 0.97
    assert compiled.report.coverage_body >= 0.97
    assert compiled.report.size_after < 0.5 * compiled.report.size_before
