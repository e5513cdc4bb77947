"""Which backend serves a layer, why, and the layout its codes are put into for that."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spallm_serve.kernels.backend import Backend, Request
from spallm_serve.kernels.cpu.backend import CpuBackend
from spallm_serve.kernels.cpu.integers import (
    INTEGERS_VARIABLE,
    fastest_integers,
    wanted_integers,
    why_no_integers,
)
from spallm_serve.kernels.cpu.library import LEVELS
from spallm_serve.kernels.gpu.backend import TritonBackend
from spallm_serve.kernels.packing import check_planes
from spallm_serve.kernels.reference_backend import ReferenceBackend

FORCE_VARIABLE = "SPALLM_KERNEL"
_log = logging.getLogger(__name__)

# In order of preference; the reference can always serve.
_AUTOMATIC: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), ReferenceBackend())
_BY_NAME: dict[str, Backend] = {
    backend.name: backend for backend in (*_AUTOMATIC, *(CpuBackend(level) for level in LEVELS))
}


@dataclass(frozen=True)
class Explanation:
    """Which backend was chosen and why the ones before it were not.

    Attributes:
        backend: its name.
        refused: name of each better one -> why it cannot serve.
        forced: whether the environment asked for it.
    """

    backend: str
    refused: dict[str, str]
    forced: bool

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.backend}{f' (by {FORCE_VARIABLE})' if self.forced else ''}{reasons}"


def explain(
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bits: int = 4,
    rows: int = 4096,
    columns: int = 4096,
    groups: int = 1,
) -> Explanation:
    """Say which backend would serve a layer.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the activations.
        bits, rows, columns, groups: of the layer.

    Raises:
        ValueError: ``SPALLM_KERNEL`` names no backend, or one that cannot serve.
    """
    return _choose(Request(device, dtype, bits, rows, columns, groups))[1]


def prepare_codes(
    planes: Tensor, columns: int, groups: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Codes in the layout of the backend that will serve them on their device.

    Args:
        planes: uint8 ``[bits, out, ceil(columns / 8)]``, bit-planes as on disk.
        columns: codes in a row.
        groups: column groups with a table each.
        dtype: of the activations to come.

    Raises:
        ValueError: as :func:`explain`, or groups that do not divide the columns.
    """
    check_planes(planes, columns)
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    if groups < 1 or columns % groups:
        raise ValueError(f"groups: expected a divisor of {columns} columns, got {groups}")
    bits, rows, _ = planes.shape
    request = Request(planes.device.type, dtype, bits, rows, columns, groups)
    backend, explanation = _choose(request)
    _announce(str(explanation))
    return backend.prepare(planes, columns, groups)


def rounds_tables(device: str, dtype: torch.dtype) -> bool:
    """Whether tables may as well be held in the dtype of the activations.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the activations.
    """
    request = Request(device, dtype, bits=4, rows=4096, columns=4096, groups=1)
    return _choose(request)[0].rounds_tables(dtype)


def integers_held(device: str, dtype: torch.dtype) -> torch.dtype | None:
    """The integers that a server holds tables as: where those are multiplied faster.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the activations.

    Raises:
        ValueError: it is asked for, and this processor or the chosen backend has no way to.
    """
    wanted = wanted_integers()
    if device != "cpu" or wanted is False:
        return None
    request = Request(device, dtype, bits=4, rows=4096, columns=4096, groups=1)
    backend = _choose(request)[0]
    level = backend.level if isinstance(backend, CpuBackend) else None
    if isinstance(wanted, torch.dtype):
        no_integers = f"{backend.name} has no integers"
        reason = no_integers if level is None else why_no_integers(wanted, level)
        if reason is not None:
            raise ValueError(f"{INTEGERS_VARIABLE}={torch.iinfo(wanted).bits}: {reason}; unset it")
        return wanted
    return None if level is None else fastest_integers(level)


def keeps_bfloat16(device: str, dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a dense weight stays as its checkpoint has it, for ``dense_linear``.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the activations.
        stored: of the weight.
    """
    if device != "cpu" or (dtype, stored) != (torch.float32, torch.bfloat16):
        return False
    request = Request(device, dtype, bits=4, rows=4096, columns=4096, groups=1)
    return isinstance(_choose(request)[0], CpuBackend)


def backend_of(codes: Tensor) -> Backend:
    """The backend whose layout codes are in.

    Raises:
        ValueError: no backend's.
    """
    forced = _forced()
    if forced is not None and forced.owns(codes):
        return forced
    for backend in _AUTOMATIC:
        if backend.owns(codes):
            return backend
    raise ValueError(
        "codes: expected what prepare_codes gives, or bit-planes uint8 [bits, out, bytes], got "
        f"{str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
    )


def _choose(request: Request) -> tuple[Backend, Explanation]:
    forced = _forced()
    if forced is not None:
        reason = forced.why_not(request)
        if reason is not None:
            raise ValueError(f"{FORCE_VARIABLE}={forced.name} cannot serve this layer: {reason}")
        return forced, Explanation(forced.name, {}, forced=True)
    refused: dict[str, str] = {}
    for backend in _AUTOMATIC:
        reason = backend.why_not(request)
        if reason is None:
            return backend, Explanation(backend.name, refused, forced=False)
        refused[backend.name] = reason
    raise AssertionError("the reference serves everything")


def _forced() -> Backend | None:
    name = os.environ.get(FORCE_VARIABLE)
    if not name:
        return None
    if name not in _BY_NAME:
        raise ValueError(f"{FORCE_VARIABLE}={name!r}: expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


@cache
def _announce(explanation: str) -> None:
    """Log a choice the first time it is made."""
    _log.info("lut_linear runs on %s", explanation)
