"""A compressed checkpoint on disk: its configuration, and checks of what is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from spallm_serve.errors import UserError
from spallm_serve.shards import INDEX_FILE, SINGLE_FILE, ShardReader
from spallm_serve.sketch import Sketch, base_digest

FORMAT_VERSION = 1
QUANT_METHOD: Literal["spallm"] = "spallm"
ESTIMATOR_FILE = "estimators.safetensors"
ESTIMATOR_A, ESTIMATOR_B = ".estimator_a", ".estimator_b"
CONFIG_FILE = "config.json"
CODES, TABLES, WEIGHT = ".codes", ".tables", ".weight"
# One shard is the most that saving holds in memory.
SHARD_BYTES = 192 << 20
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")

Bits = Literal[2, 3, 4]


class LayerFormat(BaseModel):
    """Bits and groups per row of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    groups_per_row: int = Field(ge=1)


class SketchConfig(BaseModel):
    """``quantization_config`` in ``config.json`` of a compressed checkpoint.

    Attributes:
        bits, groups_per_row: of every compressed layer that ``overrides`` does not name.
        base_digest: sha256 over the codes of every layer in name order.
        overrides: layers that differ, by module name.
        skipped: linears and embeddings left as they were, by module name.
        embeddings: compressed embedding layers, by module name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["spallm"] = QUANT_METHOD
    format: int = FORMAT_VERSION
    bits: Bits
    groups_per_row: int = Field(ge=1)
    base_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    overrides: dict[str, LayerFormat] = {}
    skipped: list[str] = []
    embeddings: list[str] = []

    def layer(self, name: str) -> LayerFormat:
        """The format of the compressed layer ``name``."""
        default = LayerFormat(bits=self.bits, groups_per_row=self.groups_per_row)
        return self.overrides.get(name, default)


def parse_sketch_config(raw: object, where: str) -> SketchConfig:
    """Validate a ``quantization_config``.

    Raises:
        UserError: not one of ours, a format version this release does not know, or fields that are
            missing, unknown or out of range.
    """
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{where}: is not a model compressed by spallm-compress")
    version = raw.get("format")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where}: checkpoint format {version!r}, this release reads format "
            f"{FORMAT_VERSION}; install a newer spallm-serve or compress the model again"
        )
    try:
        return SketchConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{where}: quantization_config: {field}: {problem['msg']}") from error


def read_sketch_config(directory: Path) -> SketchConfig:
    """The configuration of a compressed checkpoint directory (errors: as
    :func:`parse_sketch_config`)."""
    path = directory / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    chosen = raw.get("quantization_config") if isinstance(raw, dict) else None
    return parse_sketch_config(chosen, str(directory))


def sketch_names(reader: ShardReader) -> list[str]:
    """Names of the compressed layers of a checkpoint, in name order."""
    return sorted(name.removesuffix(CODES) for name in reader if name.endswith(CODES))


def sketch_tensors(name: str, sketch: Sketch) -> dict[str, Tensor]:
    """What a checkpoint holds for the compressed layer ``name``."""
    return {name + CODES: sketch.planes, name + TABLES: sketch.tables}


def verify_checkpoint(directory: Path) -> SketchConfig:
    """Read all codes and compare their digest with the configuration's.

    Raises:
        UserError: not readable, or another digest than the one written.
    """
    config = read_sketch_config(directory)
    reader = ShardReader(directory)
    names = sketch_names(reader)
    check_digest(
        base_digest((name, reader.read(name + CODES)) for name in names), config, str(directory)
    )
    return config


def check_digest(found: str, config: SketchConfig, where: str) -> None:
    """Raise UserError when the codes are not those the checkpoint was written with."""
    if found != config.base_digest:
        raise UserError(
            f"{where}: damaged checkpoint: the codes have digest {found}, "
            f"config.json says {config.base_digest}; fetch it again"
        )


def copy_companions(source: Path, target: Path, leave: Collection[str] = ()) -> None:
    """Copy what a model directory needs beside its configuration and weights: tokenizer, chat
    template, generation settings.

    Args:
        source, target: directories.
        leave: names of other files that are not copied.
    """
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.name not in (CONFIG_FILE, INDEX_FILE, *leave):
                shutil.copyfile(path, target / path.name)


def write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> int:
    """Write tensors as ``model.safetensors``, or as shards with an index where they are many.

    The tensors are taken one after another and at most :data:`SHARD_BYTES` (or one tensor, if that
    is larger) are held. The files appear under their final names, so write to a staging directory.

    Returns:
        Bytes of all tensors.
    """
    names_of: list[list[str]] = []
    total = 0
    for shard in _in_shards(tensors):
        names_of.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, directory / f"shard-{len(names_of)}.tmp", metadata={"format": "pt"})
        shard.clear()  # or it would live until the next one is full
    count = len(names_of)
    if count == 1:
        (directory / "shard-1.tmp").rename(directory / SINGLE_FILE)
        return total
    weight_map = {}
    for number, names in enumerate(names_of, start=1):
        final = f"model-{number:05d}-of-{count:05d}.safetensors"
        (directory / f"shard-{number}.tmp").rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _in_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
