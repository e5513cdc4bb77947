"""An adapter on disk: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from spallm_serve.adapter import (
    Adapter,
    AdapterConfig,
    config_fields,
    parse_adapter_config,
)
from spallm_serve.adapter_structure import check_structure
from spallm_serve.errors import UserError
from spallm_serve.precision import first_not_finite

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# All is read into memory. Tables of every row of a 70B model, 4 bits and 8 groups, take 1.7 GB.
MAX_TENSOR_BYTES = 8 << 30
_MAX_CONFIG_BYTES = 1 << 20
_READ_AT_ONCE = 16 << 20


def write_adapter(adapter: Adapter, directory: Path) -> None:
    """Write an adapter directory; it appears complete, or not at all.

    An adapter that is there already is replaced; files of others in the directory stay.

    Raises:
        UserError: the directory cannot be written.
    """
    staging = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a kill may have left
        staging.mkdir(parents=True)
        tensors = {
            name: adapter.tensors[name].detach().cpu().contiguous()
            for name in sorted(adapter.tensors)
        }
        save_file(tensors, staging / TENSOR_FILE, metadata={"format": "pt"})
        fields = config_fields(adapter.config)
        (staging / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        directory.mkdir(parents=True, exist_ok=True)
        # Without its configuration the directory is no adapter; so that goes first and comes last.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        (staging / TENSOR_FILE).replace(directory / TENSOR_FILE)
        (staging / CONFIG_FILE).replace(directory / CONFIG_FILE)
        staging.rmdir()
    except OSError as error:
        raise UserError(f"{directory}: the adapter cannot be written ({error})") from error


def read_adapter(directory: Path, base_digest: str | None = None) -> Adapter:
    """Read an adapter directory; nothing in it is run, unpickled or used as a path.

    Args:
        directory: the adapter.
        base_digest: of the base it is meant for; None accepts any.

    Raises:
        UserError: no adapter, too large, damaged, of an unknown kind, not made as its kind says, or
            made for another base.
    """
    config = read_adapter_config(directory)
    if base_digest is not None and config.base_digest not in (None, base_digest):
        raise UserError(
            f"{directory}: was made for the base {config.base_digest}, this one is {base_digest}; "
            "an adapter only fits the codes it was trained on"
        )
    path = directory / TENSOR_FILE
    try:
        if path.stat().st_size > MAX_TENSOR_BYTES:
            raise UserError(f"{path}: larger than {MAX_TENSOR_BYTES >> 30} GiB, no adapter is")
        tensors = _read_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (only safetensors are read)") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({error})") from error
    except KeyError as error:  # a dtype that safetensors knows and torch does not
        raise UserError(f"{path}: no adapter is made of {error}") from error
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    adapter = Adapter(config, tensors)
    try:
        check_structure(adapter)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    name = first_not_finite(tensors)
    if name is not None:
        raise UserError(f"{path}: {name} holds NaN or Inf")
    return adapter


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in memory of their own, in the order of their names."""
    if path.stat().st_size <= _READ_AT_ONCE:
        return dict(sorted(load(path.read_bytes()).items()))
    # Of a large one not twice as much, nor all while other threads wait for the interpreter; but
    # this takes safetensors a tenth of a millisecond for each.
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in sorted(file.keys())}


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The configuration of an adapter directory (errors: as :func:`read_adapter`)."""
    path = directory / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no adapter here (no {CONFIG_FILE})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    return parse_adapter_config(raw, str(path))
