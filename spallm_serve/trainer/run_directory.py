"""The unfinished run inside an output directory: what it was told, what it chose, checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from spallm_serve.adapter_files import CONFIG_FILE, TENSOR_FILE
from spallm_serve.errors import UserError
from spallm_serve.trainer.settings import TrainSettings

RECORD_FILE = "training.json"
_FOLDER = ".unfinished"
_FINGERPRINT_FILE = "fingerprint.json"
_SELECTION_FILE = "selection.safetensors"
# TensorBoard's files, where transformers and its users expect them.
_CURVES_FOLDER = "runs"
_OURS = {_FOLDER, CONFIG_FILE, TENSOR_FILE, RECORD_FILE, _CURVES_FOLDER}
# Where results go and what is shown on the way does not change them.
_WITHOUT_EFFECT = {"log_to", "save_every"}


class TrainingDirectory:
    """Opened for one run at a time; a killed one can be taken up.

    Args:
        output: the adapter's directory.
        fingerprint: of all that decides the result.
        resume: take up an unfinished run; False starts afresh.
        main: whether this is the process of the run that writes; it comes first.

    Attributes:
        folder: for all that the run needs until it is finished.
        curves: stays when it is finished.

    Raises:
        UserError: the output holds something else, an unfinished run of other settings or data,
            or another process is at work in it.
    """

    def __init__(self, output: Path, fingerprint: str, *, resume: bool, main: bool = True) -> None:
        self.folder = output / _FOLDER
        self.curves = output / _CURVES_FOLDER
        self._output = output
        self._main = main
        self._lock = FileLock(self.folder / "lock")
        if not main:
            return
        _check_output(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{output}: another spallm-train is at work here") from error
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error})") from error
        self._take_up(fingerprint, resume)

    def _take_up(self, fingerprint: str, resume: bool) -> None:
        path = self.folder / _FINGERPRINT_FILE
        if path.is_file() and not resume:
            for old in self.folder.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        if path.is_file():
            if json.loads(path.read_text()) != fingerprint:
                raise UserError(
                    f"{self._output}: holds an unfinished run of other settings, data or base; "
                    "give these again to go on, or --no-resume to start afresh"
                )
            return
        _write_text(path, json.dumps(fingerprint))

    def selection(self) -> dict[str, Tensor] | None:
        """What the method chose before the run was stopped, or None if it came not so far."""
        path = self.folder / _SELECTION_FILE
        return load_file(path) if path.is_file() else None

    def save_selection(self, selection: dict[str, Tensor]) -> None:
        """Keep a method's choice for a run that goes on."""
        if not self._main:
            return
        partial = self.folder / (_SELECTION_FILE + ".partial")
        save_file(selection, partial)
        partial.replace(self.folder / _SELECTION_FILE)

    def close(self) -> None:
        """Let other processes in; a run that came to nothing leaves nothing."""
        if not self._main:
            return
        self._lock.release()
        kept = [self.folder / _SELECTION_FILE, *self.folder.glob("checkpoint-*")]
        if self.folder.is_dir() and not any(path.exists() for path in kept):
            shutil.rmtree(self.folder)
            if not any(self._output.iterdir()):
                self._output.rmdir()

    def remove(self) -> None:
        """The run is finished: nothing of it is needed any more."""
        if not self._main:
            return
        self._lock.release()
        shutil.rmtree(self.folder)


def fingerprint(settings: TrainSettings, base_digest: str, version: int, processes: int) -> str:
    """sha256 over all that decides the result: settings, data, base, the code's version and how
    many processes share the rows of a step.

    Raises:
        UserError: the data cannot be read.
    """
    digest = hashlib.sha256(f"spallm-train {version} {base_digest} {processes}\n".encode())
    told = settings.model_dump(mode="json", exclude=_WITHOUT_EFFECT | {"base", "data", "eval_data"})
    digest.update(json.dumps(told, sort_keys=True).encode())
    for path in (settings.data, settings.eval_data):
        digest.update(_file_digest(path) if path is not None else b"none")
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _check_output(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; the adapter is a directory")
    foreign = sorted(path.name for path in output.iterdir() if path.name not in _OURS)
    if foreign:
        raise UserError(f"{output}: holds something else ({foreign[0]}); give another --output")
    if (output / CONFIG_FILE).is_file() and not (output / _FOLDER).is_dir():
        raise UserError(f"{output}: holds a finished adapter; give another --output or remove it")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
