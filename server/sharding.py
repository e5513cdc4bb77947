"""A worker's share of a compressed linear under tensor parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.errors import UserError
from spallm_serve.server.slotted import Sketched

_BITS_OF_A_BYTE = 8


@dataclass(frozen=True)
class Shard:
    """Some rows or some columns of a weight ``[rows, columns]``.

    Attributes:
        row, rows: the first, and how many.
        column, columns: the first, and how many.
        all_columns: of the whole weight.
    """

    row: int
    rows: int
    column: int
    columns: int
    all_columns: int

    def planes(self, planes: Tensor) -> Tensor:
        """The share of bit-planes ``[bits, out, ceil(in / 8)]``.

        Raises:
            UserError: the columns do not begin at a whole byte.
        """
        rows = planes[:, self.row : self.row + self.rows]
        if self._has_all_columns:
            return rows
        if self.column % _BITS_OF_A_BYTE or self.columns % _BITS_OF_A_BYTE:
            raise UserError(
                f"{self.all_columns} inputs cannot be shared out in parts of {self.columns}: codes "
                "are cut at multiples of 8; use fewer workers"
            )
        first = self.column // _BITS_OF_A_BYTE
        return rows[:, :, first : first + self.columns // _BITS_OF_A_BYTE]

    def tables(self, tables: Tensor) -> Tensor:
        """The share of tables ``[out, groups, 2**bits]``.

        Raises:
            UserError: the columns are no whole groups.
        """
        rows = tables[self.row : self.row + self.rows]
        groups = tables.shape[1]
        if groups == 1 or self._has_all_columns:
            return rows
        width = self.all_columns // groups
        if self.column % width or self.columns % width:
            raise UserError(
                f"{self.all_columns} inputs in {groups} groups cannot be shared out in parts of "
                f"{self.columns}: a group has one table; use fewer workers"
            )
        return rows[:, self.column // width : (self.column + self.columns) // width]

    def sketched(self, planes: Tensor, tables: Tensor) -> Sketched:
        """The share of a whole linear, in memory of its own."""
        own = self.planes(planes).contiguous(), self.tables(tables).contiguous()
        return Sketched(*own, self.columns)

    def inputs(self, matrix: Tensor) -> Tensor:
        """The columns of something ``[n, in]``."""
        return matrix[:, self.column : self.column + self.columns]

    def outputs(self, matrix: Tensor) -> Tensor:
        """The rows of something ``[out, n]``."""
        return matrix[self.row : self.row + self.rows]

    def blocks(self, blocks: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
        """The share of square blocks of a weight, cut where a worker's share ends within one.

        Args:
            blocks: ``[n, size, size]``.
            index: int32 ``[n, 2]``, place of each in units of ``size``.
            size: of an edge.

        Returns:
            The same of the share, perhaps more and smaller ones.
        """
        edge = math.gcd(size, self.row, self.rows, self.column, self.columns)
        parts = size // edge
        cut = blocks.view(-1, parts, edge, parts, edge).transpose(2, 3).reshape(-1, edge, edge)
        within = torch.cartesian_prod(torch.arange(parts), torch.arange(parts)).view(1, -1, 2)
        places = (index.long().unsqueeze(1) * parts + within).view(-1, 2)
        first = torch.tensor([self.row // edge, self.column // edge])
        count = torch.tensor([self.rows // edge, self.columns // edge])
        places = places - first
        here = ((places >= 0) & (places < count)).all(1)
        return cut[here], places[here].int(), edge

    def is_whole(self, rows: int) -> bool:
        """Whether it is all of a weight with so many rows."""
        return self.rows == rows and self._has_all_columns

    @property
    def _has_all_columns(self) -> bool:
        return self.columns == self.all_columns
