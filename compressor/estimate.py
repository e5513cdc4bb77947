"""What a run would take: bytes on disk, peak memory, minutes. Nothing is written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spallm_serve.compressor.block import DRIFT_TOKENS, WORKING_BYTES
from spallm_serve.compressor.calibration import SELF
from spallm_serve.compressor.plan import CompressionPlan, make_plan
from spallm_serve.compressor.refine import STEP_TOKENS
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.streaming import micro_batch_tokens
from spallm_serve.models import ModelSource, checked_name, decoder_blocks, skeleton, weight_of

# Measured on the 135M and 1.1B models of the benchmarks.
_INTERPRETER_BYTES = 450 << 20
# Products with H per weight and input column: rounding half a one, two gradients, two passes of
# descent, two refits and two errors; without a refit rounding and the errors.
_REFIT_PRODUCTS = 8
_ROUND_PRODUCTS = 2.5
# Share of the float32 matrix speed that a whole run keeps; bfloat16 activations go twice as fast,
# and Lloyd's searches, attention and norms take their time.
_EFFICIENCY = 0.75
_PROBE_SECONDS = 0.3
_PROBE_SIZE = 1024


@dataclass(frozen=True)
class RunEstimate:
    """What :func:`estimate_run` found.

    Attributes:
        layers: how many are compressed.
        bits_per_weight: of the compressed layers, tables counted.
        output_bytes: weights of the finished directory.
        disk_bytes: what the run needs at most while it works.
        peak_bytes: resident memory.
        minutes: time, from a measured matrix speed.
    """

    layers: int
    bits_per_weight: float
    output_bytes: int
    disk_bytes: int
    peak_bytes: int
    minutes: float


def estimate_run(source: ModelSource, settings: CompressSettings) -> RunEstimate:
    """Estimate a run from the model's shapes and a short probe of the machine.

    Raises:
        UserError: settings that do not fit the model.
    """
    model = skeleton(source.config)
    plan = make_plan(model, settings)
    sizes = output_sizes(source, model, plan, settings)
    weights = sum(layer.weight_count for layer in (plan.layers | plan.embeddings).values())
    return RunEstimate(
        layers=len(plan.layers) + len(plan.embeddings),
        bits_per_weight=8 * sizes.sketches / weights,
        output_bytes=sizes.output,
        disk_bytes=sizes.while_running,
        peak_bytes=_peak_bytes(model, plan, source, settings),
        minutes=_seconds(plan, settings) / 60,
    )


@dataclass(frozen=True)
class OutputSizes:
    """Bytes of a finished checkpoint.

    Attributes:
        sketches: codes and tables.
        untouched: weights copied as they are.
        estimators: SVD factors; at most, as if every layer had them.
    """

    sketches: int
    untouched: int
    estimators: int

    @property
    def output(self) -> int:
        """The finished directory."""
        return self.sketches + self.untouched + self.estimators

    @property
    def while_running(self) -> int:
        """The blocks' state stays until the finished shards beside it are in place."""
        return self.output + self.sketches + self.estimators


def output_sizes(
    source: ModelSource, model: PreTrainedModel, plan: CompressionPlan, settings: CompressSettings
) -> OutputSizes:
    """The sizes that a plan leads to, exact but for the estimators."""
    compressed = plan.layers | plan.embeddings
    linears = sum(layer.nbytes for layer in plan.layers.values())
    if settings.target_bits is not None:
        # The target is for the linears of the blocks.
        weights = sum(layer.weight_count for layer in plan.layers.values())
        linears = math.ceil(settings.target_bits * weights / 8)
    sketches = linears + sum(layer.nbytes for layer in plan.embeddings.values())
    untouched = sum(
        source.reader.nbytes(checked_name(source, name, tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
        if name not in model.all_tied_weights_keys
        and name.removesuffix(".weight") not in compressed
    )
    estimators = sum(
        2 * settings.estimator_rank * (layer.rows + layer.columns) for layer in plan.layers.values()
    )
    return OutputSizes(sketches, untouched, estimators)


def _peak_bytes(
    model: PreTrainedModel, plan: CompressionPlan, source: ModelSource, settings: CompressSettings
) -> int:
    prefix, blocks = decoder_blocks(model)
    # In bfloat16, and its original beside it.
    block = 4 * max(sum(item.numel() for item in block.parameters()) for block in blocks)
    embeddings = sum(
        source.reader.nbytes(checked_name(source, name, tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
        if not name.startswith(prefix) and name not in model.all_tied_weights_keys
    )
    width = max(layer.columns for layer in plan.layers.values())
    hidden = weight_of(model.get_input_embeddings()).shape[1]
    tokens = settings.samples * settings.seqlen
    activations = 2 * (tokens + min(tokens, DRIFT_TOKENS)) * hidden
    # The Hessian, its factor and the drift; gate, up and their product for a micro batch.
    running = max(settings.seqlen, micro_batch_tokens(width))
    at_work = max(WORKING_BYTES, 3 * 4 * width * width) + 3 * 4 * running * width
    peak = activations + max(embeddings, block + at_work)
    if settings.refine_steps:
        weights = sum(layer.weight_count for layer in plan.layers.values())
        # Codes a byte each, float32 embeddings with logits, activations of a sequence kept.
        kept = 4 * settings.seqlen * sum(layer.columns for layer in plan.layers.values())
        peak = max(peak, weights + 3 * embeddings + 2 * kept)
    return _INTERPRETER_BYTES + peak


def _seconds(plan: CompressionPlan, settings: CompressSettings) -> float:
    """Operations by what they are made of, over the measured speed of the machine."""
    tokens = settings.samples * settings.seqlen
    layers = plan.layers.values()
    forward = 2 * tokens * sum(layer.weight_count for layer in layers)
    # Linears that share an input share its Hessian; about half as many Hessians as layers.
    hessians = tokens * sum(layer.columns**2 for layer in layers)
    products = _REFIT_PRODUCTS if settings.refit else _ROUND_PRODUCTS
    rounding = 2 * products * sum(layer.weight_count * layer.columns for layer in layers)
    refining = 8 * settings.refine_steps * STEP_TOKENS * sum(layer.weight_count for layer in layers)
    passes = 1.0
    if settings.drift_correction:
        passes += min(1.0, DRIFT_TOKENS / tokens)
    operations = passes * forward + hessians + rounding + refining
    if settings.calibration == SELF:
        operations += 2 * forward
    return operations / (_EFFICIENCY * _matrix_speed(settings.device))


def _matrix_speed(device: str) -> float:
    """Floating point operations a second of a float32 product here."""
    a, b = (torch.randn(_PROBE_SIZE, _PROBE_SIZE, device=device) for _ in range(2))
    float((a @ b).sum())
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_SECONDS:
        float((a @ b).sum())
        rounds += 1
    return 2 * _PROBE_SIZE**3 * rounds / (time.perf_counter() - started)
