"""Low-rank factors of the weights, from the checkpoint, from a cache, or made once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spallm_serve.checkpoint import ESTIMATOR_A, ESTIMATOR_B, ESTIMATOR_FILE
from spallm_serve.errors import UserError
from spallm_serve.layers import SketchedLinear
from spallm_serve.sketch import Sketch
from spallm_serve.svd import svd_estimator
from spallm_serve.trainer.sparselora.select import Factors
from spallm_serve.trainer.sparselora.slices import bit_planes, values_of

_SEED = 0

_Linears = Mapping[str, nn.Linear | SketchedLinear]


def load_estimators(
    linears: _Linears, rank: int, checkpoint: Path | None, cache: Path | None
) -> dict[str, Factors]:
    """The estimators of some linears.

    What the checkpoint brings is taken, of whatever rank; the rest comes from the cache, as far as
    rank and weights are those it was made from, and what is in neither is made from the weights and
    put into the cache.

    Args:
        linears: by module name.
        rank: of those that are made.
        checkpoint: a model directory that may hold ``estimators.safetensors``; None for none.
        cache: a ``.safetensors`` file, read and written; None for none.

    Returns:
        Factors by module name, on the linears' devices.

    Raises:
        UserError: a file that is damaged or does not fit the linears, or a cache that cannot be
            written.
    """
    found: dict[str, Factors] = {}
    if checkpoint is not None and (checkpoint / ESTIMATOR_FILE).is_file():
        stored, _ = _read(checkpoint / ESTIMATOR_FILE)
        found = {name: stored[name] for name in linears if name in stored}
        _check_shapes(found, linears, checkpoint / ESTIMATOR_FILE)
    missing = {name: linears[name] for name in linears if name not in found}
    if missing:
        found |= _cached(missing, rank, cache)
    return {
        name: Factors(*(factor.to(values_of(linear).device) for factor in found[name]))
        for name, linear in linears.items()
    }


def dense_weight(linear: nn.Linear | SketchedLinear) -> Tensor:
    """A layer's weight ``[out, in]``; float32 where it is looked up in a sketch."""
    if isinstance(linear, SketchedLinear):
        return Sketch(bit_planes(linear), linear.tables, linear.in_features).weight()
    return linear.weight.detach()


def _cached(linears: _Linears, rank: int, cache: Path | None) -> dict[str, Factors]:
    stored, made_from = _read(cache) if cache is not None and cache.is_file() else ({}, {})
    wanted = {name: _fingerprint(linear, rank) for name, linear in linears.items()}
    stale = [name for name in linears if name not in stored or made_from.get(name) != wanted[name]]
    for name in stale:
        a, b, _ = svd_estimator(dense_weight(linears[name]).float(), rank, _SEED)
        stored[name] = Factors(a, b)
    if stale and cache is not None:
        _write(cache, stored, made_from | wanted)
    found = {name: stored[name] for name in linears}
    if cache is not None:
        _check_shapes(found, linears, cache)
    return found


def _read(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """The factors in a file and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [
                name.removesuffix(ESTIMATOR_A) for name in file.keys() if name.endswith(ESTIMATOR_A)
            ]
            factors = {
                name: Factors(
                    *(
                        file.get_tensor(name + ending).clone()
                        for ending in (ESTIMATOR_A, ESTIMATOR_B)
                    )
                )
                for name in names
            }
            return factors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); remove it") from error


def _check_shapes(found: Mapping[str, Factors], linears: _Linears, path: Path) -> None:
    for name, (a, b) in found.items():
        wanted = linears[name].in_features, linears[name].out_features
        if a.dim() != 2 or b.dim() != 2 or (a.shape[0], b.shape[1]) != wanted:
            raise UserError(
                f"{path}: {name}: factors {list(a.shape)} and {list(b.shape)} do not fit a layer "
                f"of {wanted[0]} inputs and {wanted[1]} outputs; remove the file"
            )


def _write(path: Path, factors: Mapping[str, Factors], made_from: dict[str, str]) -> None:
    tensors = {name + ESTIMATOR_A: pair.a.cpu() for name, pair in factors.items()}
    tensors |= {name + ESTIMATOR_B: pair.b.cpu() for name, pair in factors.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=made_from)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the estimators cannot be written ({error})") from error


def _fingerprint(linear: nn.Linear | SketchedLinear, rank: int) -> str:
    """Rank, type, shape and the first stored numbers: enough to know a weight again."""
    stored = values_of(linear)
    digest = hashlib.sha256(f"rank {rank} {stored.dtype} {list(stored.shape)}\n".encode())
    digest.update(stored[0].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
