"""A fine-tune's weights as tables for the codes of a base that is compressed already.

The codes are given, so the best tables of a row are a linear least-squares problem with as many
unknowns as the row has entries: SketchTune's observation that a sketch is linear in its tables, and
the half-step for tables of LNQ (Kim et al., GuidedQuant, arXiv:2505.07004, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from spallm_serve.compressor.base_hessians import for_each_hessian, read_sketch
from spallm_serve.compressor.refit import output_error, refit_tables
from spallm_serve.errors import UserError
from spallm_serve.kernels.reference import dequantize
from spallm_serve.models import ModelSource, skeleton, weight_of
from spallm_serve.sketch import Sketch

# Rows are independent, and a chunk of them takes some 60 bytes a weight.
_CHUNK_WEIGHTS = 1 << 20
# How much staying at the base's tables counts, beside the Hessian's own diagonal: less than a
# float16 table shows where inputs determine an entry, far more than what rounding in float32 would
# make of one that they do not.
_RIDGE = 1e-5
# A small system is solved in the first round and polished in the second. One that is too large to
# form is walked towards, a few conjugate gradients a round.
_ROUNDS = 64
_WORTHWHILE = 1e-5


class FineTune(Protocol):
    """The weights of a fine-tune."""

    @property
    def modules(self) -> Collection[str]:
        """Compressed layers of the base that it changed, by name in the model."""
        ...

    def weights(self, module: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's weight after fine-tuning, and before.

        Args:
            module: one of :attr:`modules`.
            base: float32 ``[out, in]``, what the base's sketch stands for.

        Returns:
            float32 ``[out, in]`` both.

        Raises:
            UserError: a weight that is damaged or has another shape.
        """
        ...


@dataclass(frozen=True)
class Change:
    """How much of a layer's change tables could hold, as squared norms under the Hessian.

    Attributes:
        wanted: of what fine-tuning changed.
        missed: of that less what the tables changed.
    """

    wanted: float
    missed: float

    @property
    def relative_error(self) -> float:
        """``||missed|| / ||wanted||``; zero where nothing was to change."""
        return math.sqrt(self.missed / self.wanted) if self.wanted else 0.0

    def __add__(self, other: Change) -> Change:
        return Change(self.wanted + other.wanted, self.missed + other.missed)


@dataclass(frozen=True)
class Projected:
    """A layer's tables, float16 ``[out, groups, 2**bits]``, and what they kept."""

    tables: Tensor
    change: Change


def project(
    source: ModelSource,
    fine_tune: FineTune,
    tokens: Tensor | None,
    on_layer: Callable[[str, Projected], None],
) -> dict[str, Projected]:
    """Tables for every layer that a fine-tune changed.

    Args:
        source: the compressed base.
        fine_tune: the weights wanted.
        tokens: calibration text, int64 ``[samples, seqlen]``; the base is run on it block by block,
            and outputs on it count. None: all weights of a layer count alike.
        on_layer: called with each layer's name and result.

    Raises:
        UserError: damaged weights, tables that do not fit in float16, or a layer that does not run
            on the text.
    """
    found: dict[str, Projected] = {}

    def use(module: str, linear: nn.Module, hessian: Tensor | None) -> None:
        sketch = read_sketch(source, module, weight_of(linear).shape[1])
        target, before = fine_tune.weights(module, sketch.weight())
        found[module] = project_layer(module, sketch, target, before, hessian)
        on_layer(module, found[module])

    model = skeleton(source.config)
    if tokens is None:
        for module in fine_tune.modules:
            use(module, model.get_submodule(module), None)
    else:
        for_each_hessian(source, model, set(fine_tune.modules), tokens, use)
    absent = [module for module in fine_tune.modules if module not in found]
    if absent:
        raise UserError(
            f"{absent[0]}: did not run on the calibration text; take other text, or none"
        )
    return found


def project_layer(
    module: str, sketch: Sketch, target: Tensor, before: Tensor, hessian: Tensor | None
) -> Projected:
    """The tables closest to a weight, and how much of the change to it they hold.

    Where the weight before is not the base's own (the uncompressed model's), what the tables
    changed is counted from the tables closest to it: the base's own error is no loss of this move.

    Args:
        module: for messages.
        sketch: of the base.
        target, before: float32 ``[out, in]``.
        hessian: float32 ``[in, in]``, or None for the identity.

    Raises:
        UserError: an entry does not fit in float16.
    """
    codes, change = sketch.codes, Change(0.0, 0.0)
    parts: list[Tensor] = []
    chunk = max(1, _CHUNK_WEIGHTS // sketch.columns)
    for start in range(0, len(codes), chunk):
        rows = slice(start, start + chunk)
        own = sketch.tables[rows].float()
        tables, part = _project_rows(codes[rows], own, target[rows], before[rows], hessian)
        parts.append(tables)
        change += part
    whole = torch.cat(parts)
    if not bool(torch.isfinite(whole).all()):
        raise UserError(f"{module}: a weight of the fine-tune does not fit in float16 tables")
    return Projected(whole, change)


def _project_rows(
    codes: Tensor, own: Tensor, target: Tensor, before: Tensor, hessian: Tensor | None
) -> tuple[Tensor, Change]:
    tables = fit_tables(codes, own, target, hessian).half()
    start = own
    if not torch.equal(before, dequantize(codes, own)):
        start = fit_tables(codes, own, before, hessian)
    wanted = target - before
    missed = wanted - dequantize(codes, tables.float() - start)
    return tables, Change(_energy(wanted, hessian), _energy(missed, hessian))


def fit_tables(
    codes: Tensor, tables: Tensor, target: Tensor, hessian: Tensor | None = None
) -> Tensor:
    """The tables that minimise ``(w_hat - w) H (w_hat - w)^T`` of every row for given codes.

    Without a Hessian an entry is the mean of the weights that use it. With one it is a ridge
    regression towards the given tables: what the Hessian does not determine stays as it was. An
    entry that no code uses keeps its value.

    Args:
        codes: uint8 ``[rows, columns]``.
        tables: float32 ``[rows, groups, clusters]``, the base's.
        target: float32 ``[rows, columns]``, w.
        hessian: float32 ``[columns, columns]``, positive semidefinite.

    Returns:
        float32 ``[rows, groups, clusters]``; not sorted.
    """
    if hessian is None:
        return _bucket_means(codes, tables, target)
    return _least_squares(codes, tables, target, hessian)


def _bucket_means(codes: Tensor, tables: Tensor, target: Tensor) -> Tensor:
    rows, groups, _ = tables.shape
    index = codes.view(rows, groups, -1).long()
    sums = torch.zeros(tables.shape, dtype=torch.float64)
    counts = sums.clone()
    sums.scatter_add_(2, index, target.double().reshape(index.shape))
    counts.scatter_add_(2, index, torch.ones(index.shape, dtype=torch.float64))
    return torch.where(counts > 0, sums / counts.clamp(min=1), tables.double()).float()


def _least_squares(codes: Tensor, tables: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    ridge = _RIDGE * hessian.diagonal()
    curved = hessian + ridge.diag()
    base = approximation = dequantize(codes, tables)

    def objective(there: Tensor) -> Tensor:
        return output_error(target, there, hessian) + (there - base).square() @ ridge

    cost = objective(approximation)
    for _ in range(_ROUNDS):
        gradient = (approximation - target) @ hessian + (approximation - base) * ridge
        moved = refit_tables(codes, tables, gradient, curved)
        there = dequantize(codes, moved)
        cost_there = objective(there)
        better = cost_there < cost
        tables = torch.where(better[:, None, None], moved, tables)
        approximation = torch.where(better[:, None], there, approximation)
        gained = torch.where(better, cost - cost_there, 0.0)
        if not bool((gained > _WORTHWHILE * cost).any()):
            break
        cost = cost - gained
    return tables


def _energy(difference: Tensor, hessian: Tensor | None) -> float:
    """``sum of diag(D H D^T)``."""
    if hessian is None:
        return float(difference.square().sum(dtype=torch.float64))
    errors = output_error(torch.zeros_like(difference), difference, hessian)
    # Rounding may leave a little less than nothing of it.
    return max(0.0, float(errors.sum(dtype=torch.float64)))
