"""An adapter as the layers of a worker take it: read, held against the base, cut to its share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from spallm_serve.adapter import (
    BLOCK_INDEX,
    BLOCKS,
    ROWS,
    Adapter,
    LoraConfig,
    LutConfig,
    SmtConfig,
    lora_modules,
)
from spallm_serve.adapter_files import read_adapter
from spallm_serve.checkpoint import TABLES, WEIGHT
from spallm_serve.errors import UserError
from spallm_serve.kernels.held_tables import HeldTables
from spallm_serve.server.additions import Addition, BlockAddition, LoraAddition
from spallm_serve.server.sharding import Shard
from spallm_serve.server.slotted import SlottedLinear
from spallm_serve.server.slotted_norm import SlottedNorm


@dataclass(frozen=True)
class Place:
    """Where a linear of the model is in a worker.

    Attributes:
        layer: the merged layer's name.
        number: of the linear in it.
        shard: the worker's share.
        all_rows: of the whole linear.
    """

    layer: str
    number: int
    shard: Shard
    all_rows: int


@dataclass(frozen=True)
class ServedLayers:
    """The compressed layers of a worker.

    Attributes:
        base_digest: of the base.
        layers: the merged ones, by name.
        places: of the model's own linears, by their names in the checkpoint.
        norms: by their names in the checkpoint.
    """

    base_digest: str
    layers: Mapping[str, SlottedLinear]
    places: Mapping[str, Place]
    norms: Mapping[str, SlottedNorm]

    @property
    def slot_bytes(self) -> int:
        """What the tables of one slot take."""
        return sum(layer.slot_bytes for layer in self.layers.values())

    @cached_property
    def base_tables(self) -> Mapping[str, HeldTables]:
        """The base's, by the names of the linears; the layers' own memory."""
        return {
            name: self.layers[place.layer].base_tables(self.layers[place.layer].parts[place.number])
            for name, place in self.places.items()
        }


@dataclass(frozen=True)
class HostAdapter:
    """What goes into a slot.

    Attributes:
        tables, additions: by layer, and in it by the number of the linear; tables in the form that
            the layer holds them in.
        norms: weights in the dtype of the activations, by name.
        nbytes: what it takes.
    """

    tables: Mapping[str, Mapping[int, HeldTables]]
    additions: Mapping[str, Mapping[int, Addition]]
    norms: Mapping[str, Tensor]
    nbytes: int

    def fill(self, served: ServedLayers, slot: int) -> None:
        """Put it into a slot that no token uses."""
        for name, layer in served.layers.items():
            layer.fill(slot, self.tables.get(name, {}), self.additions.get(name, {}))
        for name, norm in served.norms.items():
            norm.fill(slot, self.norms.get(name))


def load_host_adapter(folder: str, served: ServedLayers, dtype: torch.dtype) -> HostAdapter:
    """Read an adapter directory for a worker.

    Args:
        folder: see :func:`~spallm_serve.adapter_files.read_adapter`.
        served: the worker's layers.
        dtype: of the activations, for what is added to them.

    Raises:
        UserError: damaged, of another base, or of other shapes than the base's.
    """
    adapter = read_adapter(Path(folder), served.base_digest)
    tables: dict[str, dict[int, HeldTables]] = {}
    additions: dict[str, dict[int, Addition]] = {}
    for name, values in _tables(adapter, served):
        place = served.places[name]
        tables.setdefault(place.layer, {})[place.number] = values
    for name, addition in _additions(adapter, served, dtype):
        place = served.places[name]
        additions.setdefault(place.layer, {})[place.number] = addition
    norms = dict(_norms(adapter, served, dtype))
    # Not what the file has: tables are held in another form, with rows that are not in it.
    parts = [
        each
        for layers in (tables, additions)
        for layer in layers.values()
        for each in layer.values()
    ]
    held = sum(each.nbytes for each in (*parts, *norms.values()))
    return HostAdapter(tables, additions, norms, held)


def _tables(adapter: Adapter, served: ServedLayers) -> Iterator[tuple[str, HeldTables]]:
    if not isinstance(adapter.config, LutConfig):
        return
    # Those of one shape but for their rows: they are brought into their form together.
    whole: dict[torch.Size, dict[str, Tensor]] = {}
    for module in adapter.modules(TABLES):
        name = module + TABLES
        tensor, rows = adapter.tensors[name], adapter.tensors.get(module + ROWS)
        place, base = _place(module, served), served.base_tables[module]
        entries = base.entries.shape[-1]
        if tensor.shape[-1] != entries:
            raise UserError(f"{name}: {tensor.shape[-1]} entries, the base's have {entries}")
        if rows is not None:
            yield module, _with_rows(name, tensor, rows, place, base)
            continue
        _expect(name, tensor.shape[0], place.all_rows, "rows")
        own = place.shard.tables(tensor)
        _expect(name, list(own.shape), list(base.entries.shape), "shape")
        whole.setdefault(own.shape[1:], {})[module] = own
    for alike in whole.values():
        form = served.base_tables[next(iter(alike))]
        yield from zip(alike, form.alike_together([*alike.values()]), strict=True)


def _norms(
    adapter: Adapter, served: ServedLayers, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(adapter.config, LutConfig):
        return
    for name, tensor in adapter.tensors.items():
        if name.endswith((TABLES, ROWS)):
            continue
        module = name.removesuffix(WEIGHT)
        if module not in served.norms:
            raise UserError(f"{name}: the base has no such normalisation that can be served")
        _expect(name, list(tensor.shape), [served.norms[module].width], "shape")
        yield module, tensor.to(dtype)


def _with_rows(
    name: str, tensor: Tensor, rows: Tensor, place: Place, base: HeldTables
) -> HeldTables:
    """The base's tables with those of some rows replaced; rows of other workers are left out."""
    if int(rows[-1]) >= place.all_rows:  # they ascend
        raise UserError(f"{name}: row {int(rows[-1])}, the base has {place.all_rows}")
    first = place.shard.row
    here = (rows >= first) & (rows < first + place.shard.rows)
    columns = Shard(0, len(tensor), place.shard.column, place.shard.columns,
                    place.shard.all_columns)  # fmt: skip
    values = columns.tables(tensor)[here]
    entries = base.entries
    _expect(name, list(values.shape[1:]), list(entries.shape[1:]), "shape of a row")
    return base.replaced((rows[here] - first).long().to(entries.device), base.alike(values))


def _additions(
    adapter: Adapter, served: ServedLayers, dtype: torch.dtype
) -> Iterator[tuple[str, Addition]]:
    if isinstance(adapter.config, LoraConfig):
        for name, (a, b) in lora_modules(adapter).items():
            place = _place(name, served)
            _expect(name, a.shape[1], place.shard.all_columns, "inputs of lora_A")
            _expect(name, b.shape[0], place.all_rows, "outputs of lora_B")
            down = place.shard.inputs(a).to(dtype).T.contiguous()
            up = (adapter.config.scale * place.shard.outputs(b).float()).to(dtype).T.contiguous()
            yield name, LoraAddition(down, up)
    elif isinstance(adapter.config, SmtConfig):
        for name in adapter.modules(BLOCKS):
            place = _place(name, served)
            index, size = adapter.tensors[name + BLOCK_INDEX], adapter.config.block_size
            edge = (index.max(0).values * size).tolist()
            if edge[0] >= place.all_rows or edge[1] >= place.shard.all_columns:
                raise UserError(f"{name}{BLOCK_INDEX}: a block is outside of the layer")
            blocks = adapter.tensors[name + BLOCKS].to(dtype)
            if not place.shard.is_whole(place.all_rows):
                blocks, index, size = place.shard.blocks(blocks, index, size)
            if len(index):
                yield name, BlockAddition(blocks, index, size)


def _place(name: str, served: ServedLayers) -> Place:
    if name not in served.places:
        raise UserError(f"{name}: the base has no such compressed layer")
    return served.places[name]


def _expect(name: str, found: object, expected: object, what: str) -> None:
    if found != expected:
        raise UserError(f"{name}: {what} {found}, the base has {expected}")
