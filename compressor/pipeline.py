"""A whole compression run: blocks in order, every step saved, the checkpoint published last."""

from __future__ import annotations

import copy
import errno
import gc
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spallm_serve.checkpoint import CODES, ESTIMATOR_A, ESTIMATOR_B, TABLES, sketch_tensors
from spallm_serve.compressor.allocation import allocate_bits
from spallm_serve.compressor.block import (
    DRIFT_TOKENS,
    BlockPair,
    compress_block,
    install_sketches,
    measure_block,
)
from spallm_serve.compressor.calibration import calibration_tokens
from spallm_serve.compressor.embeddings import embedding_hessian, sketch_embedding
from spallm_serve.compressor.estimate import output_sizes
from spallm_serve.compressor.hessian import HessianAccumulator
from spallm_serve.compressor.observer import Observer
from spallm_serve.compressor.plan import make_plan, with_bits
from spallm_serve.compressor.precision import compute_dtype
from spallm_serve.compressor.publish import (
    BLOCK_FILE,
    EMBEDDINGS_FILE,
    FinishedRun,
    finished_record,
    publish,
)
from spallm_serve.compressor.record import CompressionRecord, LayerRecord, layers_record
from spallm_serve.compressor.refine import refine
from spallm_serve.compressor.run_directory import RunDirectory, fingerprint
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.compressor.streaming import (
    BlockInputs,
    capture_block_inputs,
    for_each_head_input,
    micro_batches,
)
from spallm_serve.errors import UserError
from spallm_serve.heap import return_freed_memory, return_large_blocks_at_once
from spallm_serve.models import (
    ModelSource,
    decoder_blocks,
    dematerialize,
    materialize,
    open_source,
    read_parameter,
    skeleton,
    weight_of,
)
from spallm_serve.sketch import Sketch

TOKENS_FILE = "tokens"
_ALLOCATION_FILE = "allocation"


def compress(
    model: str,
    output: Path,
    settings: CompressSettings,
    observer: Observer,
    *,
    resume: bool = True,
) -> CompressionRecord:
    """Compress a model into ``output``; an unfinished run with the same settings is resumed.

    Args:
        model: local directory, ``.gguf`` file or hub id.
        output: directory to make.
        settings: of the run.
        observer: is told of the progress.

    Raises:
        UserError: bad input, or no disk space.
    """
    return_large_blocks_at_once()
    run = RunDirectory(output)
    with run.locked(), _disk_errors(output):
        if not resume:
            run.discard()
        finished = finished_record(output)
        if finished is not None:
            # Killed after publishing: all that is left is to sweep.
            if finished.settings != settings or finished.model != model:
                raise UserError(
                    f"{output}: already holds a model; remove it or choose another --output"
                )
            run.sweep()
            return finished
        with _nothing_left_behind(run, unless=run.is_claimed):
            source = open_source(model, run.path / "source")
        resumed = run.claim(fingerprint(settings, source.directory))
        with _nothing_left_behind(run, unless=lambda: run.has(BLOCK_FILE.format(0))):
            work = _Run(model, source, run, settings, observer)
            if not resumed:
                source.check_finite()
                work.check_disk_space()
            return work.execute(resumed)


@contextmanager
def _nothing_left_behind(run: RunDirectory, *, unless: Callable[[], bool]) -> Iterator[None]:
    """Bad input that is found before any real work was done leaves the output as it was."""
    try:
        yield
    except UserError:
        if not unless():
            run.sweep()
        raise


class _Run:
    """One run's objects, so that its steps need not hand them on."""

    def __init__(
        self,
        model_name: str,
        source: ModelSource,
        run: RunDirectory,
        settings: CompressSettings,
        observer: Observer,
    ) -> None:
        self.model_name = model_name
        self.source, self.run = source, run
        self.settings, self.observer = settings, observer
        self.device = torch.device(settings.device)
        self.dtype = compute_dtype(source.reader, self.device)
        self.model = skeleton(source.config)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.plan = make_plan(self.model, settings)

    def check_disk_space(self) -> None:
        """Refuse to start what cannot be finished.

        Raises:
            UserError: too little is free; nothing is left behind.
        """
        sizes = output_sizes(self.source, self.model, self.plan, self.settings)
        output = self.run.output
        free = shutil.disk_usage(output).free
        if free < sizes.while_running:
            raise UserError(
                f"{output}: needs {sizes.while_running / 2**20:,.0f} MiB of disk space, "
                f"{free / 2**20:,.0f} MiB are free"
            )

    def execute(self, resumed: bool) -> CompressionRecord:
        """Do all that is not done yet, in order."""
        tokens = self._tokens()
        widest = max(layer.columns for layer in self.plan.layers.values())
        batches = micro_batches(tokens.to(self.device), widest)
        if self.settings.target_bits is not None:
            self.plan = with_bits(self.plan, self._allocation(batches))
        if resumed:
            done = [self.run.has(BLOCK_FILE.format(index)) for index in range(len(self.blocks))]
            self.observer.resumed(sum(done))
        inputs = self._block_inputs(batches)
        original_inputs = None
        if self.settings.drift_correction:
            original_inputs = inputs.head(math.ceil(DRIFT_TOKENS / batches[0].numel()))
        self.observer.stage("compressing", len(self.blocks), "blocks")
        for index in range(len(self.blocks)):
            self._pass_block(index, inputs, original_inputs)
            self.observer.step(index + 1)
        del original_inputs
        if self.plan.embeddings and not self.run.has(EMBEDDINGS_FILE):
            self._compress_embeddings(inputs, batches)
        del inputs
        finished = FinishedRun(
            self.model_name,
            self.source,
            self.model,
            self.plan,
            self.run,
            self.settings,
            tokens.numel(),
        )
        if self.settings.refine_steps:
            refine(finished, tokens, self.observer)
        return publish(finished)

    def _tokens(self) -> Tensor:
        if not self.run.has(TOKENS_FILE):
            self.observer.stage("calibration text", self.settings.seqlen, "tokens")
            tokens = calibration_tokens(self.source, self.settings, self.observer.step)
            self.run.save(TOKENS_FILE, {"tokens": tokens})
            # A model refers to itself; without this its mapped weights stay for a while.
            gc.collect()
            return_freed_memory()
        return self.run.load(TOKENS_FILE)["tokens"]

    def _block_inputs(self, batches: list[Tensor]) -> BlockInputs:
        self._materialize_outside()
        inputs = capture_block_inputs(self.model, batches, self.dtype)
        dematerialize(self.model)
        return inputs

    def _materialize_outside(self) -> None:
        """Bring in what lies outside the blocks, without the output head."""
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            inside = name == self.prefix or name.startswith(f"{self.prefix}.")
            if not inside and module is not head and not list(module.children()):
                materialize(module, name, self.source, self.device, self.dtype)

    def _allocation(self, batches: list[Tensor]) -> dict[str, int]:
        assert self.settings.target_bits is not None
        if not self.run.has(_ALLOCATION_FILE):
            inputs = self._block_inputs(batches)
            free = {name: layer for name, layer in self.plan.layers.items() if not layer.fixed}
            errors: dict[str, dict[int, float]] = {}
            self.observer.stage("measuring layers", len(self.blocks), "blocks")
            for index, block in enumerate(self.blocks):
                prefix = f"{self.prefix}.{index}"
                materialize(block, prefix, self.source, self.device, self.dtype)
                pair = BlockPair(prefix, index, block, inputs)
                errors |= measure_block(pair, free, self.settings)
                dematerialize(block)
                self.observer.step(index + 1)
            bits = allocate_bits(self.plan.layers, errors, self.settings.target_bits)
            self.run.save(_ALLOCATION_FILE, {}, bits)
        return dict(self.run.record(_ALLOCATION_FILE))

    def _pass_block(
        self, index: int, inputs: BlockInputs, original_inputs: BlockInputs | None
    ) -> None:
        """Compress a block, or take its sketches from the run's state, and run it."""
        block, prefix = self.blocks[index], f"{self.prefix}.{index}"
        name = BLOCK_FILE.format(index)
        materialize(block, prefix, self.source, self.device, self.dtype)
        original = None if original_inputs is None else copy.deepcopy(block)
        if self.run.has(name):
            install_sketches(block, prefix, self._saved_sketches(name))
            inputs.advance(block, index)
            if original is not None and original_inputs is not None:
                original_inputs.advance(original, index)
        else:
            pair = BlockPair(prefix, index, block, inputs, original, original_inputs)
            self._save_block(name, pair)
        dematerialize(block)

    def _save_block(self, name: str, pair: BlockPair) -> None:
        result = compress_block(pair, self.plan.layers, self.settings, self.observer.layer)
        tensors: dict[str, Tensor] = {}
        for layer, sketch in result.sketches.items():
            tensors |= sketch_tensors(layer, sketch)
        for layer, (a, b) in result.estimators.items():
            tensors |= {layer + ESTIMATOR_A: a, layer + ESTIMATOR_B: b}
        records = list(result.records.values())
        self.run.save(name, tensors, layers_record(records, result.sample))

    def _saved_sketches(self, name: str) -> dict[str, Sketch]:
        tensors = self.run.load(name)
        return {
            layer: Sketch(tensors[layer + CODES], tensors[layer + TABLES], planned.columns)
            for layer, planned in self.plan.layers.items()
            if layer + CODES in tensors
        }

    def _compress_embeddings(self, inputs: BlockInputs, batches: list[Tensor]) -> None:
        self.observer.stage("compressing embeddings", len(self.plan.embeddings), "layers")
        self._materialize_outside()
        embedding = self.model.get_input_embeddings()
        tied = set(self.model.all_tied_weights_keys)
        width = weight_of(embedding).shape[1]
        accumulator = HessianAccumulator(width, self.device)
        for_each_head_input(self.model, inputs, batches, accumulator.add)
        head_hessian = accumulator.finish()
        dematerialize(self.model)
        tensors: dict[str, Tensor] = {}
        records: list[LayerRecord] = []
        for name, layer in self.plan.embeddings.items():
            reads_ids = self.model.get_submodule(name) is embedding
            is_head = not reads_ids or bool(tied)
            hessian = embedding_hessian(width, head_hessian if is_head else None, reads_ids)
            shape = (layer.rows, layer.columns)
            weight = read_parameter(self.source, f"{name}.weight", shape)
            sketch, record = sketch_embedding(name, weight, hessian, layer, self.settings)
            tensors |= sketch_tensors(name, sketch)
            records.append(record)
            self.observer.layer(record)
            self.observer.step(len(records))
        self.run.save(EMBEDDINGS_FILE, tensors, layers_record(records, None))


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A full disk is the user's to mend; what is saved so far stays for the next try."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{output}: no space left on the disk; free some and give the same command again, "
            "the finished blocks are kept"
        ) from error
