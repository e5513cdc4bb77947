"""Tensors of a sharded safetensors checkpoint, read one at a time into memory of their own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from spallm_serve.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class ShardReader:
    """Random access by tensor name; a shard is mapped only while one of its tensors is read.

    Opening checks that every shard is there and whole (its header against its size), so that a
    long run does not fail halfway.

    Args:
        directory: holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.

    Raises:
        UserError: no safetensors weights, a missing or damaged shard, an index that names a file
            outside the directory or a tensor its shard does not hold.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._shard_paths():
            self._read_header(path)
        self._check_index()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its shard's header."""
        return self._shapes[name]

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes, from its shard's header."""
        bits = re.search(r"\d+", self._dtypes[name])
        return math.prod(self._shapes[name]) * (int(bits.group()) if bits else 8) // 8

    def dominant_dtype(self) -> str:
        """safetensors' name of the dtype that most bytes are stored in, for example ``BF16``."""
        total: dict[str, int] = {}
        for name, dtype in self._dtypes.items():
            total[dtype] = total.get(dtype, 0) + self.nbytes(name)
        return max(total, key=lambda dtype: total[dtype])

    def read(self, name: str) -> Tensor:
        """One tensor, copied out of the file: the mapping, which would count as our memory, is
        let go of."""
        return self.map(name).clone()

    def map(self, name: str) -> Tensor:
        """One tensor as a read-only view of the mapped file."""
        with safe_open(self._file_of[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor

    def _shard_paths(self) -> list[Path]:
        if (self.directory / INDEX_FILE).is_file():
            return [self._inside(name) for name in sorted(set(self._weight_map().values()))]
        if (self.directory / SINGLE_FILE).is_file():
            return [self.directory / SINGLE_FILE]
        raise UserError(
            f"{self.directory}: no {SINGLE_FILE} and no {INDEX_FILE}. "
            "Only safetensors weights are read (never pickles); convert the model with "
            "save_pretrained first."
        )

    def _weight_map(self) -> dict[str, str]:
        path = self.directory / INDEX_FILE
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a safetensors index ({error!r})") from error

    def _inside(self, name: str) -> Path:
        if Path(name).name != name:
            raise UserError(
                f"{self.directory / INDEX_FILE}: shard {name!r} is not a plain file name"
            )
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path}: shard is missing, though {INDEX_FILE} names it")
        return path

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in list(shard.keys()):
                    view = shard.get_slice(name)
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = view.get_dtype()
                    self._file_of[name] = path
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: damaged or truncated shard ({error}); fetch it again"
            ) from error

    def _check_index(self) -> None:
        if not (self.directory / INDEX_FILE).is_file():
            return
        missing = [name for name in self._weight_map() if name not in self._file_of]
        if missing:
            raise UserError(
                f"{self.directory / INDEX_FILE}: {len(missing)} tensors are in no shard, "
                f"the first is {missing[0]}"
            )
