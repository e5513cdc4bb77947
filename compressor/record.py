"""What a run writes down about itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from spallm_serve.compressor.hessian import DampedFactor
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.sketch import Sketch


class LayerRecord(BaseModel):
    """One compressed layer.

    Attributes:
        name: module name.
        rows, columns: shape of the weight.
        bits, groups_per_row: of its sketch.
        nbytes: codes and tables.
        relative_error: tr(D H D^T) / tr(W H W^T) with W the weight aimed at (the
            original, corrected for drift) and D what the sketch misses it by.
        damping: share of the mean diagonal that the Hessian was damped with.
        damping_raises: how often it had to be raised.
        unweighted: whether the Hessian could not be factored at all, so that the layer was rounded
            without it.
        estimator_energy: share of the squared weight that the SVD estimator keeps, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int
    columns: int
    bits: int
    groups_per_row: int
    nbytes: int
    relative_error: float
    damping: float
    damping_raises: int
    unweighted: bool
    estimator_energy: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Codes and tables together."""
        return 8 * self.nbytes / (self.rows * self.columns)


def layer_record(
    name: str, sketch: Sketch, relative_error: float, factor: DampedFactor, energy: float | None
) -> LayerRecord:
    """The record of a layer that was just compressed."""
    return LayerRecord(
        name=name,
        rows=sketch.planes.shape[1],
        columns=sketch.columns,
        bits=sketch.bits,
        groups_per_row=sketch.tables.shape[1],
        nbytes=sketch.nbytes,
        relative_error=relative_error,
        damping=factor.damping,
        damping_raises=factor.raises,
        unweighted=factor.upper is None,
        estimator_energy=energy,
    )


class TableSample(BaseModel):
    """A row's table beside a histogram of the weights it stands for.

    Attributes:
        layer: module name.
        row: which row.
        table: its entries (first group).
        weights: the row's original weights (first group), rounded for display.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    row: int
    table: list[float]
    weights: list[float]


def layers_record(layers: list[LayerRecord], sample: TableSample | None) -> dict[str, object]:
    """What is saved beside the tensors of a block, as JSON."""
    return {
        "layers": [layer.model_dump() for layer in layers],
        "sample": None if sample is None else sample.model_dump(),
    }


class CompressionRecord(BaseModel):
    """A finished run; holds nothing that differs between two runs with the same settings.

    Attributes:
        model: what the user named.
        settings: of the run.
        calibration_tokens: how many there were.
        layers: every compressed layer, in the model's order.
        skipped: linears left as they were.
        sizes: bytes of codes, tables, untouched weights and estimators.
        weight_counts: weights in compressed layers and in all others.
        original_bytes: size of the original's weights.
        base_digest: identity of the base.
        refine_losses: KL divergence (nats per token) at each refine step.
        samples: a few tables for the plots.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    settings: CompressSettings
    calibration_tokens: int
    layers: list[LayerRecord]
    skipped: list[str]
    sizes: dict[str, int]
    weight_counts: dict[str, int]
    original_bytes: int
    base_digest: str
    refine_losses: list[float]
    samples: list[TableSample]

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed layers, codes and tables counted."""
        bytes_used = self.sizes["codes"] + self.sizes["tables"]
        return 8 * bytes_used / self.weight_counts["compressed"]
