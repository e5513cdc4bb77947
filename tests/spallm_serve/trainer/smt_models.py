"""Tiny frozen models, dense and sketched, and oracles for scores, choices and dense weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spallm_serve.layers import SketchedLinear
from spallm_serve.models import decoder_blocks, linears, load_model, weight_of
from spallm_serve.sketch import Sketch
from spallm_serve.trainer.method import Batch
from tests.tiny_models import save_tiny

MODELS = ("llama", "gpt2", "qwen3", "gemma3", "llama-sketched")


def attention_inputs(name: str) -> tuple[str, ...]:
    """The endings of the layers that make queries, keys and values."""
    return ("c_attn",) if name == "gpt2" else ("q_proj", "k_proj", "v_proj")


def tiny(name: str, directory: Path) -> PreTrainedModel:
    """One of :data:`MODELS`, frozen; the same each time."""
    model = load_model(save_tiny(name.removesuffix("-sketched"), directory / name))
    if name.endswith("-sketched"):
        prefix, blocks = decoder_blocks(model)
        for seed, (linear_name, linear) in enumerate(linears(blocks).items()):
            model.set_submodule(f"{prefix}.{linear_name}", sketched_like(linear, seed))
    return model.requires_grad_(False)


def random_sketch(rows: int, columns: int, seed: int = 0) -> Sketch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (rows, columns), generator=generator, dtype=torch.uint8)
    return Sketch.from_codes(codes, torch.randn(rows, 1, 8, generator=generator) * 0.2)


def sketched_like(linear: nn.Module, seed: int = 0) -> SketchedLinear:
    """A layer of the same shape and bias with a random sketch."""
    rows, columns = weight_of(linear).shape
    sketch, bias = random_sketch(rows, columns, seed), linear.bias
    layer = SketchedLinear(columns, rows, sketch.bits, 1, bias is not None)
    state = {"codes": sketch.planes, "tables": sketch.tables}
    layer.load_state_dict(state if bias is None else state | {"bias": bias})
    return layer.requires_grad_(False)


def dense_linear(kind: str, rows: int, columns: int) -> nn.Module:
    """A frozen layer of a kind, ``linear``, ``conv1d`` or ``sketched``, with random numbers."""
    layer = Conv1D(rows, columns) if kind == "conv1d" else nn.Linear(columns, rows)
    nn.init.normal_(layer.bias)
    return sketched_like(layer) if kind == "sketched" else layer.requires_grad_(False)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight ``[out, in]`` of such a layer, float64."""
    if isinstance(layer, SketchedLinear):
        return random_sketch(layer.out_features, layer.in_features).weight().double()
    return weight_of(layer).double()


def scattered(blocks: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """The dense ``[out, in]`` that blocks stand for, block by block; differentiable."""
    size = blocks.shape[1]
    dense = blocks.new_zeros(-(-rows // size) * size, -(-columns // size) * size)
    for number, (row, column) in enumerate(index.tolist()):
        one = torch.zeros_like(dense)
        one[row * size : (row + 1) * size, column * size : (column + 1) * size] = 1
        spots = one.nonzero(as_tuple=True)
        dense = dense.index_put(spots, blocks[number].flatten())
    return dense[:rows, :columns]


def naive_scores(dy: Tensor, x: Tensor, size: int) -> Tensor:
    """Block scores from the whole gradient of a weight, float64."""
    gradient = (dy.double().T @ x.double()).abs()
    rows, columns = gradient.shape
    return torch.tensor(
        [
            [float(gradient[i : i + size, j : j + size].mean()) for j in range(0, columns, size)]
            for i in range(0, rows, size)
        ],
        dtype=torch.float64,
    )


def naive_choice(named: dict[str, Tensor], count: int) -> dict[str, list[list[int]]]:
    """Every block with its score, sorted; of equal scores the first."""
    ranked = sorted(
        (-float(score[i, j]), position, i, j, name)
        for position, (name, score) in enumerate(named.items())
        for i in range(score.shape[0])
        for j in range(score.shape[1])
    )
    chosen: dict[str, list[list[int]]] = {}
    for _, _, i, j, name in sorted(ranked[:count], key=lambda entry: entry[1:4]):
        chosen.setdefault(name, []).append([i, j])
    return chosen


def batch(seed: int = 0, rows: int = 2, tokens: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 131, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
