"""torch modules whose weights are a sketch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spallm_serve.kernels import lut_linear, prepare_codes
from spallm_serve.kernels.choice import backend_of
from spallm_serve.kernels.packing import plane_width, unpack_codes
from spallm_serve.kernels.reference import dequantize


class _Sketched(nn.Module):
    """Holds codes and tables; no dense weight is ever kept."""

    codes: Tensor
    tables: Tensor

    def __init__(
        self, rows: int, columns: int, bits: int, groups_per_row: int, device: str | None
    ) -> None:
        super().__init__()
        self.columns = columns
        shape = (bits, rows, plane_width(columns))
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8, device=device))
        table_shape = (rows, groups_per_row, 1 << bits)
        self.register_buffer("tables", torch.zeros(table_shape, dtype=torch.float16, device=device))

    def prepared_codes(self, dtype: torch.dtype) -> Tensor:
        """The codes as the kernel for activations of a dtype reads them."""
        return prepare_codes(self.codes, self.columns, self.tables.shape[1], dtype)

    def multiply(self, x: Tensor, codes: Tensor, tables: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., columns] -> [..., rows]`` in the dtype of x; codes are prepared ones."""
        flat = x.reshape(-1, self.columns).contiguous()
        y = lut_linear(flat, codes, tables.unsqueeze(0), None, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moving or casting the module must not touch the tables' float16: they are the format.
        tables = self.tables
        super()._apply(fn, recurse)
        if self.tables.dtype != tables.dtype:
            self.tables = tables.to(self.tables.device)
        return self


class SketchedLinear(_Sketched):
    """A linear layer from codes and tables; in the place of ``nn.Linear`` and of GPT-2's Conv1D.

    The first product puts the codes into the layout of the kernel, in place of the bit-planes; they
    become bit-planes again when the layer is saved, moved or loaded.

    Args:
        in_features, out_features, bits, groups_per_row: the sketch's shape.
        bias: whether there is a bias ``[out]``.
        dtype: of the bias.
        device: where the buffers are made.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        groups_per_row: int,
        bias: bool,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, groups_per_row, device)
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self._prepared_for: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of x."""
        return self.product(x, self.tables)

    def product(self, x: Tensor, tables: Tensor) -> Tensor:
        """What :meth:`forward` gives with other tables ``[out, groups, 2**bits]`` for the codes;
        differentiable in them."""
        self.prepare(x.dtype)
        return self.multiply(x, self.codes, tables, self.bias)

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the codes into the order of the kernel for activations of a dtype, if they are not.

        The first product does it; done before, a checkpoint's mapped files are gone by then.
        """
        if self._prepared_for != dtype:
            self._restore_planes()
            # What inference mode makes could not take part in training later.
            with torch.inference_mode(False):
                self.codes = self.prepared_codes(dtype)
            self._prepared_for = dtype

    def planes(self) -> Tensor:
        """The codes as bit-planes, uint8 ``[bits, out, ceil(in / 8)]``, as they are on disk."""
        self._restore_planes()
        return self.codes

    def _restore_planes(self) -> None:
        if self._prepared_for is not None:
            with torch.inference_mode(False):
                self.codes = backend_of(self.codes).planes(self.codes)
            self._prepared_for = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._restore_planes()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self._restore_planes()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self._restore_planes()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        _, groups, entries = self.tables.shape
        bits = entries.bit_length() - 1
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}, "
            f"groups_per_row={groups}, bias={self.bias is not None}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: dense, GPT-2's Conv1D or sketched."""
    return isinstance(module, nn.Linear | Conv1D | SketchedLinear)


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, also where the weight is transposed or a sketch."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    assert isinstance(linear, nn.Linear | SketchedLinear)
    return linear.out_features, linear.in_features


class SketchedEmbedding(_Sketched):
    """A token embedding from codes and tables; only the rows looked up are made dense.

    Args:
        num_embeddings, embedding_dim, bits, groups_per_row: the sketch's shape.
        scale: what the architecture multiplies embeddings by (Gemma), or None.
        dtype: of the output.
        device: where the buffers are made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        groups_per_row: int,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, groups_per_row, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale, self.dtype = scale, dtype
        # For logits; looking up needs the bit-planes beside it.
        self._prepared: tuple[torch.dtype, Tensor] | None = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._prepared = None
        # What comes out is cast as a dense embedding's weight would be.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.tables.device)).dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., embedding_dim] -> [..., num_embeddings]``, for a head tied to the embedding."""
        if self._prepared is None or self._prepared[0] != x.dtype:
            with torch.inference_mode(False):
                self._prepared = x.dtype, self.prepared_codes(x.dtype)
        return self.multiply(x, self._prepared[1], self.tables, bias)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...] -> [..., embedding_dim]``."""
        flat = ids.reshape(-1)
        codes = unpack_codes(self.codes[:, flat], self.columns)
        rows = dequantize(codes, self.tables[flat].to(self.dtype))
        if self.scale is not None:
            rows = rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)
        return rows.view(*ids.shape, self.embedding_dim)


class TiedHead(nn.Module):
    """An output head that reads the sketch of the token embedding; it has no state of its own."""

    def __init__(self, embedding: SketchedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # In a tuple, so that the embedding does not become a submodule here too.
        self._embedding = (embedding,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., embedding_dim] -> [..., num_embeddings]``."""
        return self._embedding[0].logits(x, self.bias)
