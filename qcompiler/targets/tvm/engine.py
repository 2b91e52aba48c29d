"""What runs: TVM's virtual machine on a shared library, the constants beside it in a file of their own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import safetensors
import tvm
import tvm_ffi
from safetensors.numpy import save_file
from tvm import relax

from qcompiler.core import ArtefactError, DataError, ModelError
from qcompiler.targets.tvm.emit.dims import Size, axes_of, evaluate, from_json, to_json
from qcompiler.targets.tvm.emit.emitted import Emitted, input_sizes
from qcompiler.targets.tvm.isa import Isa, runs_here
from qcompiler.targets.tvm.lowering import compile_module

LIBRARY, OBJECT, WEIGHTS, ENGINE = "model.so", "model.o", "weights.safetensors", "engine.json"
VERSION = 1
COMPILERS = ("g++", "clang++", "c++")
LINK = f"`g++ -shared -o {LIBRARY} model*.o` in its folder links it"


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a library takes and gives.

    Attributes:
        inputs: shape of each input by name, in the order of the parameters.
        outputs: names, in the order of the results.
        limits: open sizes that must not grow beyond a number: a table of positions ends there.
        isa: what the kernels were made for.
    """

    inputs: Mapping[str, tuple[Size, ...]]
    outputs: tuple[str, ...]
    limits: tuple[tuple[Size, int], ...]
    isa: Isa

    def check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Open axes of one name have one size, and no table is too short.

        Raises:
            DataError: otherwise.
        """
        axes: dict[str, tuple[int, str]] = {}
        for name, sizes in self.inputs.items():
            for size, found in zip(sizes, feeds[name].shape, strict=True):
                for axis in axes_of(size):
                    known, where = axes.setdefault(axis, (found, name))
                    if known != found:
                        raise DataError(f"inputs {where!r} and {name!r} differ in {axis}: {known} and {found}.")
        for size, most in self.limits:
            value = evaluate(size, {axis: number for axis, (number, _) in axes.items()})
            if value > most:
                raise DataError(f"{size} is {value}, and the model has a table of {most}.")


class Engine:
    """An executable of target tvm-llvm.

    Args:
        executable: TVM's.
        constants: the weights, in the order of the parameters that follow the inputs.
        interface: what it takes and gives.
    """

    def __init__(self, executable: Any, constants: Mapping[str, npt.NDArray[Any]], interface: Interface) -> None:
        self.interface = interface
        self._executable = executable
        self._main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self._constants = {name: tvm.runtime.tensor(np.asarray(a, order="C")) for name, a in constants.items()}
        self._arguments = list(self._constants.values())

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], threads: int = 0) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name.

        Raises:
            DataError: open axes do not fit each other, or are too long.
            ModelError: TVM fails.
        """
        self.interface.check(feeds)
        arguments = [tvm.runtime.tensor(np.asarray(feeds[name], order="C")) for name in self.interface.inputs]
        use_threads(threads)
        try:
            results = self._main(*arguments, *self._arguments)
        except Exception as error:
            raise ModelError(f"the compiled model failed to run: {str(error).splitlines()[0]}") from error
        return {name: result.numpy() for name, result in zip(self.interface.outputs, results, strict=True)}

    def save(self, folder: Path) -> None:
        """Write the library, the weights and the interface.

        Where there is no C++ compiler, object files take the library's place: code, and the virtual machine's program.
        A warning, and :func:`load`, say how to link them.
        """
        linked = any(shutil.which(name) for name in COMPILERS)
        if linked:
            self._executable.export_library(str(folder / LIBRARY))
        else:
            _write_objects(self._executable, folder)
            warnings.warn(f"no C++ compiler is found: model*.o take the library's place: {LINK}.", stacklevel=2)
        arrays = {f"{i:05d}": tensor.numpy() for i, tensor in enumerate(self._arguments)}
        save_file(arrays, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # save_file makes it readable by its owner only
        described = {
            "version": VERSION,
            "tvm": tvm.__version__,
            "inputs": {name: [to_json(size) for size in sizes] for name, sizes in self.interface.inputs.items()},
            "outputs": list(self.interface.outputs),
            "limits": [[to_json(size), most] for size, most in self.interface.limits],
            "constants": list(self._constants),
            "isa": dataclasses.asdict(self.interface.isa),
        }
        (folder / ENGINE).write_text(json.dumps(described, indent=1), encoding="utf-8")


_threads: int | None = None


def use_threads(count: int) -> None:
    """Narrow TVM's thread pool, which all engines of a process share; 0 is all of it."""
    global _threads
    if count != _threads:  # configuring it again makes the next parallel loop dearer
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
        _threads = count


def build(model: ir.Model, emitted: Emitted) -> Engine:
    """Compile what was emitted for a model."""
    graph = model.graph
    interface = Interface(
        {v.name or "": input_sizes(v) for v in graph.inputs if v.name not in graph.initializers},
        tuple(v.name or "" for v in graph.outputs),
        emitted.limits,
        emitted.isa,
    )
    return Engine(compile_module(emitted.module, emitted.isa), emitted.constants, interface)


def load(folder: Path) -> Engine:
    """What :meth:`Engine.save` wrote.

    Raises:
        ArtefactError: a file is missing or not readable, or the library is for a processor that this machine has not.
    """
    described = _read(folder / ENGINE)
    try:
        interface = Interface(
            {name: tuple(map(from_json, sizes)) for name, sizes in described["inputs"].items()},
            tuple(described["outputs"]),
            tuple((from_json(size), int(most)) for size, most in described["limits"]),
            Isa(**described["isa"]),
        )
        names: Sequence[str] = described["constants"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{folder / ENGINE} cannot be read: {error!r}.") from error
    if not runs_here(interface.isa):
        raise ArtefactError(
            f"{folder} was compiled for {interface.isa.cpu}, whose instructions this machine lacks: compile it again."
        )
    library = folder / LIBRARY
    if not library.is_file():
        if (folder / OBJECT).is_file():
            raise ArtefactError(f"{folder} was saved without a C++ compiler: {LINK}.")
        raise ArtefactError(f"{folder} has no {LIBRARY}: the folder is incomplete.")
    try:
        executable = tvm.runtime.load_module(str(library))
        with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
            constants = {name: file.get_tensor(f"{i:05d}") for i, name in enumerate(names)}
        return Engine(executable, constants, interface)
    except Exception as error:
        raise ArtefactError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def _write_objects(executable: Any, folder: Path) -> None:
    def keep(output: str, objects: Sequence[str], **_: Any) -> None:
        for i, path in enumerate(objects):
            shutil.copyfile(path, Path(output).with_suffix(f".{i}.o" if i else ".o"))

    executable.export_library(str(folder / OBJECT), fcompile=keep)


def _read(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        raise ArtefactError(f"{path} is not of version {VERSION}: compile the model again.")
    return described
