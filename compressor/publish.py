"""From the saved state of a run to the finished checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from spallm_serve.checkpoint import (
    CODES,
    CONFIG_FILE,
    ESTIMATOR_A,
    ESTIMATOR_B,
    ESTIMATOR_FILE,
    TABLES,
    LayerFormat,
    SketchConfig,
    copy_companions,
    write_shards,
)
from spallm_serve.compressor.plan import CompressionPlan, PlannedLayer
from spallm_serve.compressor.record import CompressionRecord, LayerRecord, TableSample
from spallm_serve.compressor.report import write_report
from spallm_serve.compressor.run_directory import RunDirectory
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.heap import return_freed_memory
from spallm_serve.models import ModelSource, decoder_blocks, read_parameter
from spallm_serve.sketch import base_digest

BLOCK_FILE = "block-{:05d}"
EMBEDDINGS_FILE = "embeddings"
REFINED_FILE = "refined"
RECORD_FILE = "spallm_report.json"
REPORT_FILE = "spallm_report.html"

_SHOWN_SAMPLES = 4


@dataclass(frozen=True)
class FinishedRun:
    """What there is to publish.

    Attributes:
        model_name: what the user called the model.
        source: the original, for all that was not compressed.
        model: its skeleton.
        plan: what was compressed.
        run: holds the sketches.
        settings: of the run.
        calibration_tokens: how many there were.
    """

    model_name: str
    source: ModelSource
    model: PreTrainedModel
    plan: CompressionPlan
    run: RunDirectory
    settings: CompressSettings
    calibration_tokens: int

    @property
    def state_files(self) -> list[str]:
        """The saved files, in the model's order."""
        blocks = len(decoder_blocks(self.model)[1])
        files = [BLOCK_FILE.format(index) for index in range(blocks)]
        return files + ([EMBEDDINGS_FILE] if self.plan.embeddings else [])

    @property
    def compressed(self) -> dict[str, PlannedLayer]:
        """Every compressed layer."""
        return self.plan.layers | self.plan.embeddings

    def saved_tensors(self) -> SavedTensors:
        """All that was saved, what the distillation changed in the place of what it was."""
        files = self.state_files
        if self.run.has(REFINED_FILE):
            files.append(REFINED_FILE)
        return SavedTensors(self.run, files)


class SavedTensors:
    """The tensors of several saved files by name; a later file hides an earlier one's."""

    def __init__(self, run: RunDirectory, files: list[str]) -> None:
        self._run = run
        self._file_of = {name: file for file in files for name in run.names(file)}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self, *endings: str) -> list[str]:
        """The names with one of these endings, in name order."""
        return sorted(name for name in self._file_of if name.endswith(endings))

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._run.load_one(self._file_of[name], name)


def publish(finished: FinishedRun) -> CompressionRecord:
    """Write the checkpoint, its estimators and its report, and move them into the output."""
    return_freed_memory()
    staging = finished.run.staging()
    saved = finished.saved_tensors()
    sizes = {"codes": 0, "tables": 0, "other": 0, "estimators": 0}
    write_shards(_counted(_final_tensors(finished, saved), sizes), staging)
    estimators = {name: saved.read(name) for name in saved.names(ESTIMATOR_A, ESTIMATOR_B)}
    if estimators:
        save_file(estimators, staging / ESTIMATOR_FILE, metadata={"format": "pt"})
        sizes["estimators"] = sum(tensor.nbytes for tensor in estimators.values())
    del estimators
    copy_companions(finished.source.directory, staging)
    digest = base_digest(
        (name.removesuffix(CODES), saved.read(name)) for name in saved.names(CODES)
    )
    record = _record(finished, sizes, digest)
    (staging / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n")
    write_report(record, staging / REPORT_FILE)
    config = json.loads((finished.source.directory / CONFIG_FILE).read_text())
    config["quantization_config"] = _sketch_config(finished, digest).model_dump()
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    finished.run.publish(CONFIG_FILE)
    return record


def finished_record(output: Path) -> CompressionRecord | None:
    """The record of a finished run, or None where the output is not complete."""
    if not (output / CONFIG_FILE).is_file():
        return None
    return CompressionRecord.model_validate_json((output / RECORD_FILE).read_text())


def _final_tensors(finished: FinishedRun, saved: SavedTensors) -> Iterator[tuple[str, Tensor]]:
    tied = set(finished.model.all_tied_weights_keys)
    for name, parameter in finished.model.state_dict().items():
        layer = name.removesuffix(".weight")
        if name in tied:
            continue
        if name in saved:
            yield name, saved.read(name)
        elif layer in finished.compressed and layer != name:
            yield layer + CODES, saved.read(layer + CODES)
            yield layer + TABLES, saved.read(layer + TABLES)
        else:
            yield name, read_parameter(finished.source, name, tuple(parameter.shape))


def _counted(
    tensors: Iterator[tuple[str, Tensor]], sizes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        kind = {CODES: "codes", TABLES: "tables"}.get("." + name.rpartition(".")[2], "other")
        sizes[kind] += tensor.nbytes
        yield name, tensor


def _sketch_config(finished: FinishedRun, digest: str) -> SketchConfig:
    settings = finished.settings
    default = LayerFormat(bits=settings.bits, groups_per_row=settings.groups_per_row)
    return SketchConfig(
        bits=settings.bits,
        groups_per_row=settings.groups_per_row,
        base_digest=digest,
        overrides={
            name: layer.format
            for name, layer in finished.compressed.items()
            if layer.format != default
        },
        skipped=finished.plan.skipped,
        embeddings=[
            name
            for name in finished.plan.embeddings
            if finished.model.get_submodule(name) is finished.model.get_input_embeddings()
        ],
    )


def _record(finished: FinishedRun, sizes: dict[str, int], digest: str) -> CompressionRecord:
    layers: list[LayerRecord] = []
    samples: list[TableSample] = []
    run = finished.run
    for file in finished.state_files:
        raw = run.record(file)
        layers += [LayerRecord.model_validate(layer) for layer in raw["layers"]]
        if raw["sample"] is not None:
            samples.append(TableSample.model_validate(raw["sample"]))
    reader = finished.source.reader
    compressed = sum(layer.weight_count for layer in finished.compressed.values())
    total = sum(parameter.numel() for parameter in finished.model.parameters())
    return CompressionRecord(
        model=finished.model_name,
        settings=finished.settings,
        calibration_tokens=finished.calibration_tokens,
        layers=layers,
        skipped=finished.plan.skipped,
        sizes=sizes,
        weight_counts={"compressed": compressed, "other": total - compressed},
        original_bytes=sum(reader.nbytes(name) for name in reader),
        base_digest=digest,
        refine_losses=run.record(REFINED_FILE) if run.has(REFINED_FILE) else [],
        samples=_spread(samples, _SHOWN_SAMPLES),
    )


def _spread(samples: list[TableSample], count: int) -> list[TableSample]:
    """``count`` samples evenly over the depth of the model."""
    if len(samples) <= count:
        return samples
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]
