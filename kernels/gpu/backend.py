"""The Triton backend: CUDA tensors; under Triton's interpreter CPU tensors, for tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from spallm_serve.kernels.arguments import check_code_rows, check_slots_in_range, check_types
from spallm_serve.kernels.backend import Request
from spallm_serve.kernels.gpu.layout import from_gpu_layout, row_words, to_gpu_layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


class TritonBackend:
    """Programs of :mod:`spallm_serve.kernels.gpu.products`, imported when first needed.

    A slot without tables gives NaN for its tokens: to raise, the device would have to be waited
    for.
    """

    name = "triton"

    def why_not(self, request: Request) -> str | None:
        """CUDA tensors of the usual types, on GPUs from Ampere on."""
        interpreted = _is_interpreted()
        if request.device != ("cpu" if interpreted else "cuda"):
            return f"the tensors are on {request.device}"
        if request.dtype not in _DTYPES:
            return f"no kernel for {request.dtype}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if not interpreted and not torch.cuda.is_available():
            return "torch sees no GPU"
        if not interpreted and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
            return "the GPU is older than Ampere"
        return None

    def rounds_tables(self, dtype: torch.dtype) -> bool:
        """Not promised."""
        return False

    def prepare(self, planes: Tensor, columns: int, groups: int) -> Tensor:
        """See :func:`to_gpu_layout`."""
        return to_gpu_layout(planes, columns, groups)

    def planes(self, codes: Tensor) -> Tensor:
        """See :func:`from_gpu_layout`."""
        return from_gpu_layout(codes)

    def owns(self, codes: Tensor) -> bool:
        """Words in rows."""
        return codes.dim() == 2 and codes.dtype == torch.int32

    def rows(self, codes: Tensor) -> int:
        """The first dimension, less the header."""
        return codes.shape[0] - 1

    def check(self, codes: Tensor, columns: int, groups: int, bits: int) -> None:
        """Refuse codes of another width.

        Raises:
            ValueError: what was expected and what came.
        """
        if not codes.is_cuda and not _is_interpreted():
            raise ValueError(
                f"codes: are laid out for a GPU, got on {codes.device}; prepare_codes makes those "
                "for a device from bit-planes that lie there"
            )
        check_code_rows(codes, row_words(columns, groups, bits), columns, groups, bits)

    def lut_linear(
        self, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :func:`spallm_serve.kernels.gpu.launch.multiply`.

        Raises:
            ValueError: an unsupported dtype; under the interpreter a slot without tables.
        """
        from spallm_serve.kernels.gpu import launch

        check_types(x, tables, bias, _DTYPES)
        if not x.is_cuda:
            check_slots_in_range(slots, tables.shape[0])
            return launch.multiply(_readable(x), codes, tables, slots, bias).to(x.dtype)
        return launch.multiply(x, codes, tables, slots, bias)

    def input_gradient(
        self, dy: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None, columns: int
    ) -> Tensor:
        """See :func:`spallm_serve.kernels.gpu.launch.input_gradient`."""
        from spallm_serve.kernels.gpu import launch

        return launch.input_gradient(_readable(dy), codes, tables, slots, columns).to(dy.dtype)

    def table_gradient(
        self, dy: Tensor, x: Tensor, codes: Tensor, tables: Tensor, slots: Tensor | None
    ) -> Tensor:
        """See :func:`spallm_serve.kernels.gpu.launch.table_gradient`."""
        from spallm_serve.kernels.gpu import launch

        return launch.table_gradient(_readable(dy), _readable(x), codes, tables, slots)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _readable(tensor: Tensor) -> Tensor:
    """The interpreter cannot multiply bfloat16 matrices, which NumPy has no type for."""
    interpreted = not tensor.is_cuda and tensor.dtype == torch.bfloat16
    return tensor.float() if interpreted else tensor
