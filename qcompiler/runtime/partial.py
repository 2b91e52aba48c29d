"""``OUT.partial``: where a compile keeps what is finished, so that another can go on from there when it was killed."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qcompiler.core import ArtefactError, Note
from qcompiler.frontends.source import Scratch

MANIFEST, LOCK, RESULT = "manifest.json", "lock", "result"


class Workplace:
    """A folder for one compile: what it is of, how many of its blocks are finished, and their files.

    As a context manager it removes the folder when the compile ends well, or with an error that a second try would meet
    again; a folder with finished blocks stays when the compile was interrupted, or the disk refused.

    Args:
        output: the folder beside which ``<output>.partial`` is made; None: a temporary folder, which nothing resumes.
        resume: go on from what is there.
        force: start anew although something is there.
    """

    def __init__(self, output: Path | None, resume: bool = False, force: bool = False) -> None:
        self._output, self._resume, self._force = output, resume, force
        self.scratch: Scratch | None = None
        self._path: Path | None = None
        self._lock: IO[bytes] | None = None
        self._manifest: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """The folder; :meth:`begin` makes it."""
        assert self._path is not None
        return self._path

    @property
    def result(self) -> Path | None:
        """Where to save before the rename; None: the caller's choice."""
        return self._path / RESULT if self._path is not None and self._output is not None else None

    @property
    def finished(self) -> int:
        """How many blocks are."""
        return len(self._manifest["blocks"])

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Make the folder, or take up the one that is there.

        Args:
            made_from: source, options, and whatever else decides the result: JSON-ready.

        Raises:
            ArtefactError: there is an unfinished compile and neither ``resume`` nor ``force`` was given, it is another
                compile's, its files are damaged, a compile is running there, or the disk refuses.
        """
        made_from = json.loads(json.dumps(made_from))
        if self._output is None:
            self.scratch = Scratch()
            self._path = self.scratch.path
            self._manifest = {"made_from": made_from, "blocks": []}
            return
        folder = self._output.with_name(f"{self._output.name}.partial")
        begun = folder.is_dir()
        if begun and not (folder / MANIFEST).is_file() and any(p.name != LOCK for p in folder.iterdir()):
            raise ArtefactError(f"{folder} exists and is no unfinished compile: move it away.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder
            self._take_lock()
            if begun and (folder / MANIFEST).is_file():
                self._take_up(made_from)
            else:
                self._manifest = {"made_from": made_from, "blocks": []}
                self._write()
        except OSError as error:
            raise ArtefactError(f"cannot write {folder}: {error}.") from error

    def file(self, number: int) -> Path:
        """Where block ``number`` is kept; its weights beside it, as ``<file>.data``."""
        return self.path / f"block-{number:05d}.onnx"

    def finish(self, number: int, notes: Sequence[Note]) -> None:
        """Write down that the next block is there, and what was decided on the way."""
        assert number == self.finished
        told = [dataclasses.astuple(note) for note in notes]
        self._manifest["blocks"].append({"sizes": self._sizes(number), "notes": told})
        if self._output is not None:
            self._write()

    def notes(self, number: int) -> list[Note]:
        """What was decided on the way to a finished block."""
        return [Note(*told) for told in self._manifest["blocks"][number]["notes"]]

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        again = isinstance(error, ArtefactError | OSError | MemoryError) or not isinstance(error, Exception | None)
        if not (again and self._manifest.get("blocks")):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _take_lock(self) -> None:
        lock = (self.path / LOCK).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ArtefactError(f"another compile is at work in {self.path}: wait for it, or stop it.") from None
        self._lock = lock

    def _take_up(self, made_from: Mapping[str, Any]) -> None:
        """Read what is there.

        Raises:
            ArtefactError: it cannot be gone on from.
        """
        if self._force and not self._resume:
            self._clear()
            self._manifest = {"made_from": dict(made_from), "blocks": []}
            self._write()
            return
        try:
            if not self._resume:
                raise ArtefactError(
                    f"{self.path} holds an unfinished compile: go on with resume=True (--resume), or start anew with "
                    "force=True (--force)."
                )
            try:
                manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
                before, blocks = manifest["made_from"], manifest["blocks"]
            except (ValueError, KeyError, TypeError) as error:
                raise ArtefactError(f"{self.path / MANIFEST} is damaged: start anew with force=True.") from error
            self._compare(before, made_from)
            self._manifest = {"made_from": before, "blocks": blocks}
            for number, block in enumerate(blocks):
                if self._sizes(number) != block["sizes"]:
                    raise ArtefactError(f"{self.file(number)} is damaged: start anew with force=True (--force).")
        except ArtefactError:
            assert self._lock is not None
            self._lock.close()
            self._lock = None  # what is there is not ours to remove
            raise

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ArtefactError(
                    f"{self.path} was begun with another {key} ({_short(before.get(key))}, now "
                    f"{_short(now.get(key))}): give the same, or start anew with force=True (--force)."
                )

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _write(self) -> None:
        """Whole or not at all, and after the block's own files."""
        new = self.path / f"{MANIFEST}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(self._manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / MANIFEST)

    def _sizes(self, number: int) -> list[int]:
        path = self.file(number)
        files: Sequence[Path] = (path, path.with_name(f"{path.name}.data"))
        return [file.stat().st_size if file.is_file() else 0 for file in files]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
