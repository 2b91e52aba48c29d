"""A synthetic LLaMA-shaped model, larger than memory should need to be, compiled whole and once more after a kill.

    python benchmarks/bounded_memory.py FOLDER [--gigabytes 12] [--scheme w4a16] [--methods RTN,HQQ] [--keep]

Writes the model (float16 safetensors, a shard a layer, seeded) into FOLDER. For each method compiles it in a process of
its own, kills another such process when half of its weights are finished, lets a third go on, and compares the bytes.
Prints time and the peak resident memory of each process. Needs about three times the model's size on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SEED = 0
DEVIATION = 0.02
METHODS = {"RTN": "annotate,insert,fold", "HQQ": "annotate,insert,hqq,fold"}
"""Pipelines that treat each weight by itself."""
COMPARED = ("model.onnx", "model.onnx.data", "recipe.json")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA decoder; the default widths are those of the 7B model."""

    layers: int
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000

    @staticmethod
    def of_bytes(size: float, **widths: int) -> Shape:
        """As many layers as come nearest to ``size`` bytes in float16."""
        shape = Shape(1, **widths)
        layer, rest = shape.layer_parameters, 2 * shape.vocabulary * shape.hidden
        return dataclasses.replace(shape, layers=max(1, round((size / 2 - rest) / layer)))

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the tensors by name: embedding, layers, final norm and head."""
        h, i, v = self.hidden, self.intermediate, self.vocabulary
        attention = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
        mlp = {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        norms = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        parts: dict[str, tuple[int, ...]] = {**attention, **mlp, **norms}
        layers = [{f"model.layers.{n}.{k}.weight": s for k, s in parts.items()} for n in range(self.layers)]
        return [{"model.embed_tokens.weight": (v, h)}, *layers, {"model.norm.weight": (h,), "lm_head.weight": (v, h)}]


def write_model(folder: Path, shape: Shape) -> int:
    """Write the model shard by shard; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    shards, total, where = shape.shards(), 0, {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        rng = np.random.default_rng([SEED, number])
        arrays = {
            key: np.ones(size, np.float16) if len(size) == 1 else (rng.standard_normal(size, np.float32) * DEVIATION)
            for key, size in tensors.items()
        }
        arrays = {key: array.astype(np.float16) for key, array in arrays.items()}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        total += sum(array.nbytes for array in arrays.values())
        where.update(dict.fromkeys(arrays, name))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    status: int

    def __str__(self) -> str:
        times = f"{self.seconds:7.0f} s  {self.cpu_seconds:7.0f} CPU-s"
        return f"{times}  peak RSS {self.peak_bytes / 1e9:.2f} GB  exit {self.status}"


def run(source: Path, output: Path, scheme: str, passes: str, kill_after: int | None = None) -> Run:
    """Compile in a process of its own, from where an earlier one was killed; kill it after that many weights."""
    code = "import sys; from qcompiler.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--scheme", scheme, "--passes", passes, "--resume"]
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code, "compile", str(source), "-o", str(output), *options])
    while kill_after is not None and child.poll() is None:
        if finished(output) >= kill_after:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    _, status, usage = os.wait4(child.pid, 0) if child.returncode is None else (0, child.returncode, None)
    if usage is None:
        raise RuntimeError(f"the process ended with {status} before it could be killed")
    wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))


def finished(output: Path) -> int:
    """Weights that a compile has finished so far."""
    manifest = output.with_name(f"{output.name}.partial") / "manifest.json"
    return len(json.loads(manifest.read_text())["blocks"]) if manifest.is_file() else 0


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that the same compile makes alike."""
    found = {}
    for name in COMPARED:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def compare(source: Path, scheme: str, method: str, weights: int) -> None:
    """Compile whole, killed and resumed beside ``source``; tell what each took, and whether the bytes are the same."""
    outputs = [source.with_name(f"{method}-{name}") for name in ("whole", "resumed")]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    steps = (
        ("uninterrupted", outputs[0], None),
        ("killed half way", outputs[1], weights // 2),
        ("resumed", outputs[1], None),
    )
    for name, output, kill_after in steps:
        print(f"{method} {name:16}{run(source, output, scheme, METHODS[method], kill_after)}", flush=True)
    first, second = map(digests, outputs)
    print(f"{method} identical bytes" if first == second else f"{method} DIFFERENT: {first} {second}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, by comma (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the files")
    options = parser.parse_args()
    source, shape = options.folder / "model", Shape.of_bytes(options.gigabytes * 1e9)
    if not source.exists():
        start = time.perf_counter()
        size = write_model(source, shape)
        print(
            f"{size / 1e9:.2f} GB in {shape.layers} layers, written in {time.perf_counter() - start:.0f} s", flush=True
        )
    for method in options.methods.split(","):
        compare(source, options.scheme, method, weights=7 * shape.layers + 1)
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
