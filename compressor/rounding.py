"""Choose a code for every weight, columns in order, each column's error passed on to the rest.

OBQ / GPTQ error feedback (SpaLLM section 2.2, "learning the sketching matrix") on the non-uniform
grid that the tables give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spallm_serve.compressor import native

BLOCK_COLUMNS = 128


class TransposedTables:
    """Tables laid out for one column of weights at a time: entries first, rows last.

    Comparing a whole column with one entry is then a contiguous vector operation.

    Args:
        tables: float32 ``[rows, groups, clusters]``, ascending.
    """

    def __init__(self, tables: Tensor) -> None:
        self._entries = tables.permute(1, 2, 0).contiguous()
        self._midpoints = (self._entries[:, 1:] + self._entries[:, :-1]) / 2

    def nearest(self, values: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The code of the entry nearest to each value, int64 ``[rows]``, and that entry."""
        code = (values > self._midpoints[group]).sum(dim=0)
        return code, self._entries[group].gather(0, code.unsqueeze(0)).squeeze(0)


def round_with_feedback(weight: Tensor, tables: Tensor, groups: Tensor, factor: Tensor) -> Tensor:
    """Round column after column: ``code = argmin |c_k - w_i|``, ``e = (w_i - c_code) / U_ii``,
    ``W[:, i:] -= e U[i, i:]``, the trailing columns updated once a block.

    Args:
        weight: float32 ``[rows, columns]``, columns in rounding order.
        tables: float32 ``[rows, n_groups, clusters]``, ascending.
        groups: int64 ``[columns]``, the table each column uses.
        factor: float32 ``[columns, columns]``, upper triangular U with H^-1 = U^T U, in the same
            column order.

    Returns:
        uint8 ``[rows, columns]`` codes.
    """
    columns = weight.shape[1]
    work = weight.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    round_columns = native.round_columns if native.usable_for(work) else _round_columns
    tables, groups, factor = tables.contiguous(), groups.contiguous(), factor.contiguous()
    for block in column_blocks(columns):
        errors = round_columns(work, tables, groups, factor, codes, block)
        if block.stop < columns:
            work[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
    return codes


def column_blocks(columns: int) -> list[slice]:
    """The blocks of columns that rounding and descent walk, in order."""
    starts = range(0, columns, BLOCK_COLUMNS)
    return [slice(start, min(start + BLOCK_COLUMNS, columns)) for start in starts]


def _round_columns(
    work: Tensor, tables: Tensor, groups: Tensor, factor: Tensor, codes: Tensor, columns: slice
) -> Tensor:
    """One block, on any device; see :func:`spallm_serve.compressor.native.round_columns`."""
    block = work[:, columns].T.contiguous()
    errors = torch.empty_like(block)
    local = factor[columns, columns].contiguous()
    diagonal = local.diagonal().tolist()
    lookup = TransposedTables(tables)
    for i, group in enumerate(groups[columns].tolist()):
        code, chosen = lookup.nearest(block[i], group)
        codes[:, columns.start + i] = code
        torch.sub(block[i], chosen, out=errors[i]).div_(diagonal[i])
        block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
    return errors.T
