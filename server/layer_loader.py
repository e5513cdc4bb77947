"""Takes the tensors of a checkpoint for one layer of vLLM's, each the worker's share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from spallm_serve.checkpoint import CODES, TABLES, WEIGHT
from spallm_serve.errors import UserError
from spallm_serve.server.sharding import Shard
from spallm_serve.server.slotted import Dense, Linear, Sketched

# Layers are typed Any: they are vLLM's, and carry what it and we put on them.
_QKV = {"q": 0, "k": 1, "v": 2}


class LayerLoader:
    """Takes codes and tables, or whole weights, as they come, each the worker's share, until the
    layer is made.

    Args:
        layer: of vLLM's.
        columns: inputs of the worker.
        rows: outputs of the worker, of each linear.
        all_columns: inputs.

    Attributes:
        left: numbers of the linears that were left as they are.
        rows: outputs of each whole linear that was loaded.
        shards: what the worker takes of each.
    """

    def __init__(self, layer: Any, columns: int, rows: list[int], all_columns: int) -> None:
        self._layer = layer
        self._loaded: dict[tuple[str, int], Tensor] = {}
        self.left: set[int] = set()
        self.rows: dict[int, int] = {}
        self.shards = [
            Shard(_first_row(layer, number, own), own, _first_column(layer, columns), columns,
                  all_columns)
            for number, own in enumerate(rows)
        ]  # fmt: skip

    def attach(self) -> None:
        """Give the layer parameters that take what is loaded."""
        for ending in self._endings():
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._taking(ending)  # type: ignore[attr-defined]
            self._layer.register_parameter(ending.removeprefix("."), parameter)
        self._layer.spallm_loader = self

    def detach(self) -> None:
        """Nothing more is loaded."""
        for ending in self._endings():
            delattr(self._layer, ending.removeprefix("."))
        self._loaded.clear()

    def linears(self, names: list[str]) -> list[Linear]:
        """What was loaded.

        Raises:
            UserError: something was not.
        """
        return [self._linear(number, name) for number, name in enumerate(names)]

    def sketch(self, name: str) -> Sketched:
        """What was loaded for a layer that is one compressed linear.

        Raises:
            UserError: something was not.
        """
        planes, tables = (self._taken(ending, 0, name) for ending in (CODES, TABLES))
        return Sketched(planes, tables, self.shards[0].columns)

    def _linear(self, number: int, name: str) -> Linear:
        if number in self.left:
            return Dense(self._taken(WEIGHT, number, name))
        planes, tables = (self._taken(ending, number, name) for ending in (CODES, TABLES))
        return Sketched(planes, tables, self.shards[number].columns)

    def _endings(self) -> tuple[str, ...]:
        return (CODES, TABLES, WEIGHT) if self.left else (CODES, TABLES)

    def _taken(self, ending: str, number: int, name: str) -> Tensor:
        if (ending, number) not in self._loaded:
            raise UserError(f"{name}{ending}: is not in the checkpoint")
        return self._loaded[ending, number]

    def _taking(self, ending: str) -> Any:
        def take(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            number = _QKV[shard] if isinstance(shard, str) else shard or 0
            own = self.shards[number]
            if ending == WEIGHT:
                kept = own.outputs(own.inputs(loaded))
            elif ending == CODES:
                self.rows[number] = loaded.shape[1]
                kept = own.planes(loaded)
            else:
                kept = own.tables(loaded)
            # What is read lies in the processor's memory; the parameter lies where the worker is.
            self._loaded[ending, number] = kept.to(parameter.device, copy=True)

        return take


def _first_row(layer: Any, number: int, rows: int) -> int:
    """Where a worker's outputs of a linear begin."""
    if isinstance(layer, RowParallelLinear) or getattr(layer, "tp_size", 1) == 1:
        return 0
    rank = int(layer.tp_rank)
    if isinstance(layer, QKVParallelLinear) and number > 0:
        # Workers beyond the number of key heads hold copies.
        rank //= int(layer.num_kv_head_replicas)
    return rank * rows


def _first_column(layer: Any, columns: int) -> int:
    """Where a worker's inputs begin."""
    return int(layer.tp_rank) * columns if isinstance(layer, RowParallelLinear) else 0
