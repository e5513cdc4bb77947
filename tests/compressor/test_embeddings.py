"""What an error in an embedding costs, and the sketch of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spallm_serve.checkpoint import LayerFormat
from spallm_serve.compressor.embeddings import embedding_hessian, sketch_embedding
from spallm_serve.compressor.plan import PlannedLayer
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.kernels.reference import dequantize


def head_hessian(width: int = 6) -> Tensor:
    inputs = 3 * torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    return 2 * inputs.T @ inputs / 40


def test_input_embedding_counts_all_entries_alike() -> None:
    assert torch.equal(embedding_hessian(6, None, reads_ids=True), torch.eye(6))


def test_head_counts_as_its_hidden_states_do() -> None:
    head = head_hessian()
    found = embedding_hessian(6, head, reads_ids=False)
    torch.testing.assert_close(found, 6 * head / head.trace())
    assert float(found.diagonal().mean()) == pytest.approx(1)


def test_tied_matrix_is_both() -> None:
    head = head_hessian()
    found = embedding_hessian(6, head, reads_ids=True)
    torch.testing.assert_close(found, 6 * head / head.trace() + torch.eye(6))
    torch.testing.assert_close(found, embedding_hessian(6, 1e3 * head, reads_ids=True))


@pytest.mark.parametrize("reads_ids", [False, True])
def test_dead_hidden_dimensions_get_a_positive_diagonal(reads_ids: bool) -> None:
    head = head_hessian()
    head[2], head[:, 2] = 0, 0
    before = head.clone()
    found = embedding_hessian(6, head, reads_ids=reads_ids)
    assert found[2].tolist() == [0, 0, 1, 0, 0, 0]
    assert bool((torch.linalg.eigvalsh(found.double()) > 0).all())
    assert torch.equal(head, before)


def test_head_that_never_fires_is_harmless() -> None:
    zero = torch.zeros(6, 6)
    assert torch.equal(embedding_hessian(6, zero, reads_ids=False), torch.eye(6))
    assert torch.equal(embedding_hessian(6, zero, reads_ids=True), torch.eye(6))
    assert torch.equal(embedding_hessian(6, None, reads_ids=False), torch.eye(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketch_of_an_embedding_is_close_to_it(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = PlannedLayer(50, 24, LayerFormat(bits=4, groups_per_row=2), fixed=False)
    hessian = embedding_hessian(24, head_hessian(24), reads_ids=True)
    sketch, _ = sketch_embedding("embed", weight, hessian, layer, CompressSettings())
    assert (sketch.bits, sketch.columns, tuple(sketch.tables.shape)) == (4, 24, (50, 2, 16))
    assert torch.equal(sketch.weight(), dequantize(sketch.codes, sketch.tables.float()))
    distance = (sketch.weight() - weight.float()).norm() / weight.float().norm()
    assert float(distance) < 0.15
