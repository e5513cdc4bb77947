"""A compressed model whose tables and norms can be trained, and the loss of distilling into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from spallm_serve.kernels.reference import dequantize
from spallm_serve.models import is_norm
from spallm_serve.sketch import Sketch


class _TableLinear(torch.autograd.Function):
    """``x W^T`` with W looked up from codes and tables, multiplied in the dtype of x.

    Neither W nor an index of it is kept for the backward pass: both are made again from the codes,
    one byte a weight. The tables' gradient is summed in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, tables: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, tables)
        return x @ dequantize(codes, tables).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        x, codes, tables = ctx.saved_tensors
        grad_x = grad @ dequantize(codes, tables).to(grad.dtype)
        grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        rows, groups, _ = tables.shape
        index = codes.view(rows, groups, -1).long()
        grad_tables = torch.zeros_like(tables)
        values = grad_weight.to(tables.dtype).view(rows, groups, -1)
        grad_tables.scatter_add_(2, index, values)
        return grad_x, None, grad_tables


class TrainableLinear(nn.Module):
    """A linear layer from fixed codes and float32 tables that take a gradient."""

    codes: Tensor

    def __init__(self, sketch: Sketch, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("codes", sketch.codes.to(device))
        self.tables = nn.Parameter(sketch.tables.to(device, torch.float32))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``, in autocast's dtype where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _TableLinear.apply(x, self.codes, self.tables)
        return y if self.bias is None else y + self.bias


def make_trainable(
    model: PreTrainedModel, sketches: dict[str, Sketch], device: torch.device
) -> dict[str, nn.Parameter]:
    """Put trainable layers in the place of compressed linears.

    Args:
        model: its other parameters have their values and take no gradient.
        sketches: by module name.
        device: where the tables go.

    Returns:
        What is trained, by the parameter's name in the checkpoint: tables, and the weights and
        biases of the norms, all float32.
    """
    trained: dict[str, nn.Parameter] = {}
    for name, sketch in sketches.items():
        parent, _, leaf = name.rpartition(".")
        bias = model.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        layer = TrainableLinear(sketch, bias, device)
        setattr(model.get_submodule(parent), leaf, layer)
        trained[f"{name}.tables"] = layer.tables
    for name, module in model.named_modules():
        if is_norm(module):
            for leaf, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(True)
                trained[f"{name}.{leaf}"] = parameter
    return trained


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean KL divergence of the student's next-token distribution from the teacher's, in nats.

    Args:
        student_logits, teacher_logits: ``[..., vocabulary]``.
    """
    student = F.log_softmax(student_logits.float(), dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float(), dim=-1).flatten(0, -2)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
