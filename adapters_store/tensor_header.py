"""The header of a safetensors file, read before anything else of it is believed or mapped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.untrusted_json import parse_json

# Tables and rows of every linear of a model of 200 layers have a header of half a megabyte.
MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 1 << 14
_LENGTH_BYTES = 8
_LONGEST_NAME = 256
_MOST_DIMENSIONS = 3
_METADATA = "__metadata__"
# Bytes of a value; only what adapters are made of.
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}


@dataclass(frozen=True)
class TensorHeader:
    """What a header says of one tensor.

    Attributes:
        name, dtype, shape: as safetensors has them, ``F16`` for float16.
        begin, end: where its bytes are in the file, from the file's beginning.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> list[TensorHeader]:
    """The tensors of a safetensors file, in the order of their bytes.

    Their bytes fill the file: from the header to the end, without gaps or overlaps. So what is
    there was all looked at.

    Raises:
        RejectedError: not such a file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise RejectedError(
                f"the tensors are no safetensors file, or were cut off: {size} bytes, whose header "
                f"would have {length}"
            )
        if length > MAX_HEADER_BYTES:
            raise RejectedError(
                f"the tensors' header has {length} bytes; no adapter needs over {MAX_HEADER_BYTES}"
            )
        text = file.read(length)
    raw = parse_json(text, "the tensors' header", depth=3)
    if not isinstance(raw, dict):
        raise RejectedError("the tensors' header is no JSON object")
    _check_metadata(raw.pop(_METADATA, {}))
    if not raw:
        raise RejectedError("the tensors' file holds no tensor")
    if len(raw) > MAX_TENSORS:
        raise RejectedError(f"{len(raw)} tensors; no adapter has over {MAX_TENSORS}")
    start = _LENGTH_BYTES + length
    found = [_tensor(name, fields, start) for name, fields in raw.items()]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_tiling(found, start, size)
    return found


def _tensor(name: str, fields: Any, start: int) -> TensorHeader:
    if not 0 < len(name) <= _LONGEST_NAME or not (name.isascii() and name.isprintable()):
        raise RejectedError(
            f"tensor {name[:100]!r}: a name has 1 to {_LONGEST_NAME} printable ASCII characters"
        )
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise RejectedError(f"{name}: expected dtype, shape and data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RejectedError(
            f"{name}: dtype {str(dtype)[:40]!r}; adapters are made of {', '.join(DTYPES)}"
        )
    if not _are_counts(shape) or not 1 <= len(shape) <= _MOST_DIMENSIONS:
        raise RejectedError(f"{name}: shape {str(shape)[:80]} is not 1 to 3 sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise RejectedError(f"{name}: data_offsets {str(offsets)[:80]} are no begin and end")
    wanted, given = math.prod(shape) * DTYPES[dtype], offsets[1] - offsets[0]
    if wanted != given:
        raise RejectedError(f"{name}: {dtype} {shape} takes {wanted} bytes, not the {given} given")
    return TensorHeader(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: Any) -> bool:
    """Whether it is a list of whole numbers that a file's sizes can be."""
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < 1 << 48 for each in value
    )


def _check_metadata(raw: Any) -> None:
    texts = isinstance(raw, dict) and all(isinstance(value, str) for value in raw.values())
    if not texts:
        raise RejectedError(f"the tensors' header: {_METADATA} is no object of strings")


def _check_tiling(tensors: list[TensorHeader], start: int, size: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            kind = "overlap" if tensor.begin < end else "leave a gap before"
            raise RejectedError(f"the bytes of the tensors {kind} {tensor.name}")
        end = tensor.end
    if end != size:
        raise RejectedError(
            f"the tensors' bytes end at {end}, the file at {size}: cut off, or something hides "
            "behind them"
        )
