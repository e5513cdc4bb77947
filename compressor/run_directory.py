"""The state of an unfinished run: safe against a kill at any moment.

Everything lies in ``OUTPUT/.unfinished`` until the end. A file appears under its final name only
when it is complete (written, synced, renamed), so what is there can be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError

UNFINISHED = ".unfinished"
# Raised whenever the bytes that a run writes change for the same settings.
ALGORITHM_VERSION = 5


class RunDirectory:
    """The working folder of one run inside its output directory.

    Args:
        output: the directory the finished checkpoint will be.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / UNFINISHED
        self._marker = self.path / "fingerprint"
        self._moved = self.path / "moved.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of this output.

        Raises:
            UserError: another run is at work on it, or the output holds something else.
        """
        check_output(self.output)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.output}: another run is writing here") from error
        try:
            yield
        finally:
            lock.release()

    def is_claimed(self) -> bool:
        """Whether an unfinished run lies here."""
        return self._marker.is_file()

    def claim(self, fingerprint: str) -> bool:
        """Take up an unfinished run with this fingerprint, or start a new one.

        Returns:
            True where there was one.

        Raises:
            UserError: the output holds an unfinished run of something else.
        """
        if self.is_claimed():
            if self._marker.read_text() == fingerprint:
                return True
            raise UserError(
                f"{self.output}: holds an unfinished run with other settings or another model; "
                "give the same command to resume it, remove the directory, or choose another "
                "--output"
            )
        for stale in self.path.glob("*.safetensors"):
            stale.unlink()  # of a run whose marker was swept, but not all else
        _write_atomically(self._marker, lambda path: path.write_text(fingerprint))
        return False

    def has(self, name: str) -> bool:
        """Whether the tensors ``name`` were saved."""
        return self._file(name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], record: object = None) -> None:
        """Save tensors with a JSON record, all or nothing."""
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"record": json.dumps(record)}
        _write_atomically(
            self._file(name), lambda path: save_file(contiguous, path, metadata=metadata)
        )

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under ``name``."""
        with safe_open(self._file(name), framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}

    def names(self, name: str) -> list[str]:
        """Names of the tensors saved under ``name``."""
        with safe_open(self._file(name), framework="pt") as file:
            return list(file.keys())

    def load_one(self, name: str, key: str) -> Tensor:
        """One of the tensors saved under ``name``."""
        with safe_open(self._file(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.clone()

    def record(self, name: str) -> Any:
        """The JSON record saved with ``name``."""
        with safe_open(self._file(name), framework="pt") as file:
            return json.loads(file.metadata()["record"])

    def staging(self) -> Path:
        """A fresh folder for the finished files."""
        path = self.path / "finished"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def publish(self, last: str) -> None:
        """Move the staged files into the output, ``last`` at the end, then drop the state.

        A directory with the file ``last`` is complete; a kill before that leaves an unfinished run
        that the same command finishes, a kill after it only the state to be swept away.
        """
        staged = self.path / "finished"
        names = sorted(path.name for path in staged.iterdir())
        _write_atomically(self._moved, lambda path: path.write_text(json.dumps(names)))
        for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
            _sync(path)
            path.replace(self.output / path.name)
        _sync(self.output)
        self.sweep()

    def discard(self) -> None:
        """Forget an unfinished run; only the lock stays.

        Raises:
            UserError: it is finished and was only not swept.
        """
        if (self.output / "config.json").is_file():
            raise UserError(
                f"{self.output}: already holds a model; remove it or choose another --output"
            )
        if self._moved.is_file():
            for name in json.loads(self._moved.read_text()):
                (self.output / name).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("lock", self._marker.name):
                path.unlink()
        # Last: what is left behind by a kill before this still belongs to that run.
        self._marker.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the state, and the output directory if nothing else is in it."""
        shutil.rmtree(self.path)
        if not any(self.output.iterdir()):
            self.output.rmdir()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def check_output(output: Path) -> None:
    """Refuse an output path that holds anything but an unfinished run.

    Raises:
        UserError: a file, a finished model, or a directory with something else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output names a new directory")
    if (output / UNFINISHED).is_dir():
        return
    if (output / "config.json").is_file():
        raise UserError(f"{output}: already holds a model; remove it or choose another --output")
    if any(output.iterdir()):
        raise UserError(f"{output}: holds something else; choose another --output")


def fingerprint(settings: CompressSettings, model_directory: Path) -> str:
    """Identity of a run: the algorithm, the settings, the model's files and the calibration text.

    Weight files are told apart by name, size and time of change: hashing terabytes would take
    longer than the check is worth.
    """
    digest = hashlib.sha256(f"spallm-compress {ALGORITHM_VERSION}\n".encode())
    digest.update(settings.model_dump_json().encode())
    for path in sorted(model_directory.iterdir()):
        if path.suffix == ".safetensors":
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        elif path.suffix == ".json":
            digest.update(path.read_bytes())
    calibration = Path(settings.calibration)
    if calibration.is_file():
        digest.update(calibration.read_bytes())
    return digest.hexdigest()


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
