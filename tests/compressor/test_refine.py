"""Distillation into tables and norms: its gradient, its loss, and what it leaves behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spallm_serve.compressor.refine as refine_module
from spallm_serve.checkpoint import CODES, TABLES, read_sketch_config, verify_checkpoint
from spallm_serve.compressor.distillation import TrainableLinear, _TableLinear, distillation_loss
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import TOKENS_FILE, compress
from spallm_serve.compressor.record import CompressionRecord
from spallm_serve.compressor.run_directory import RunDirectory
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.kernels.reference import dequantize
from spallm_serve.models import load_model
from spallm_serve.shards import SINGLE_FILE, ShardReader
from spallm_serve.sketch import Sketch
from tests.tiny_models import save_tiny

QUICK = {"bits": 2, "samples": 4, "seqlen": 16, "estimator_rank": 0, "refit": False}
ROWS, COLUMNS = 3, 12


def problem(bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, codes and tables; of each row's first group one entry has no code."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 5, COLUMNS, dtype=torch.float64, generator=generator)
    codes = torch.randint(1, 1 << bits, (ROWS, COLUMNS), generator=generator).to(torch.uint8)
    tables = torch.randn(ROWS, groups, 1 << bits, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), codes, tables.requires_grad_()


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 2), (4, 4)])
def test_gradient_of_tables_and_inputs(bits: int, groups: int) -> None:
    x, codes, tables = problem(bits, groups)
    assert torch.autograd.gradcheck(lambda x, t: _TableLinear.apply(x, codes, t), (x, tables))
    output = _TableLinear.apply(x, codes, tables)
    plain = x @ dequantize(codes, tables).T
    torch.testing.assert_close(output, plain)
    grad = torch.randn_like(plain)
    found = torch.autograd.grad(output, (x, tables), grad)
    wanted = torch.autograd.grad(plain, (x, tables), grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[1][:, :, 0].any()


def test_trainable_layer_is_its_sketch() -> None:
    _, codes, tables = problem(3, 2)
    sketch = Sketch.from_codes(codes, tables.detach())
    x = torch.randn(4, COLUMNS)
    for bias in (None, torch.randn(ROWS)):
        layer = TrainableLinear(sketch, bias, torch.device("cpu"))
        wanted = x @ sketch.weight().T + (0 if bias is None else bias)
        torch.testing.assert_close(layer(x), wanted)
        assert [name for name, _ in layer.named_parameters()] == ["tables"]


def naive_divergence(student: Tensor, teacher: Tensor) -> float:
    student, teacher = student.double().flatten(0, -2), teacher.double().flatten(0, -2)
    total = 0.0
    for given, wanted in zip(student, teacher, strict=True):
        p, q = wanted.exp() / wanted.exp().sum(), given.exp() / given.exp().sum()
        total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (3 * torch.randn(1, *shape, generator=generator)).to(dtype) for _ in range(2)
    )
    found = float(distillation_loss(student, teacher))
    assert found == pytest.approx(naive_divergence(student, teacher), rel=1e-4)
    assert float(distillation_loss(student + 4, student)) == pytest.approx(0, abs=0.05)


def run(source: Path, output: Path, **settings: object) -> CompressionRecord:
    chosen = CompressSettings.model_validate(QUICK | settings)
    return compress(str(source), output, chosen, SilentObserver())


def calibration_tokens(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **settings: object
) -> Tensor:
    """Run with ``settings`` and catch the tokens that were saved with the run."""
    caught: list[Tensor] = []
    real = RunDirectory.save

    def save(self: RunDirectory, name: str, tensors: dict[str, Tensor], record: object = None):
        if name == TOKENS_FILE:
            caught.append(tensors["tokens"].clone())
        real(self, name, tensors, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", save)
        run(source, output, **settings)
    return caught[0]


@torch.no_grad()
def divergence(original: Path, compressed: Path, tokens: Tensor) -> float:
    teacher, student = load_model(original), load_model(compressed)
    wanted = teacher(input_ids=tokens).logits.double().log_softmax(-1)
    given = student(input_ids=tokens).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spallm_serve.compressor.publish.write_report", lambda record, path: None)
    monkeypatch.setattr(refine_module, "STEP_TOKENS", 64)


@pytest.mark.parametrize(
    ("name", "embeddings"),
    [("llama", None), ("llama-tied", 4), ("gemma3", 4), ("phi", 4), ("gpt2", 4), ("opt", None)],
)
def test_brings_the_model_closer_to_the_original(
    name: str, embeddings: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(name, tmp_path / "source")
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    tokens = calibration_tokens(source, plain, monkeypatch, embeddings=embeddings)
    record = run(source, refined, embeddings=embeddings, refine_steps=8)
    before, after = (divergence(source, output, tokens) for output in (plain, refined))
    assert after < 0.95 * before
    assert len(record.refine_losses) == 8
    # All windows fit in a step, so the first loss is that of the model as it was compressed.
    assert record.refine_losses[0] == pytest.approx(before, rel=1e-3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model whose norms are stored in bfloat16, compressed without and with distillation."""
    directory = tmp_path_factory.mktemp("pair")
    source = save_tiny("llama-tied", directory / "source")
    tensors = load_file(source / SINGLE_FILE)
    norms = {name: t.to(torch.bfloat16) for name, t in tensors.items() if "norm" in name}
    save_file(tensors | norms, source / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine_module, "STEP_TOKENS", 64)
        # Large steps, so that entries of a table do trade places.
        patch.setattr(refine_module, "TABLE_RATE", 0.3)
        run(source, directory / "plain", embeddings=4, bits=3)
        run(source, directory / "refined", embeddings=4, bits=3, refine_steps=8)
    return source, directory / "plain", directory / "refined"


def test_tables_stay_in_ascending_order(pair: tuple[Path, Path, Path]) -> None:
    reader = ShardReader(pair[2])
    tables = [name for name in reader if name.endswith(TABLES)]
    assert len(tables) == 22
    for name in tables:
        table = reader.read(name)
        assert table.dtype == torch.float16
        assert bool((table.diff(dim=2) >= 0).all())


def test_codes_are_those_the_digest_was_taken_of(pair: tuple[Path, Path, Path]) -> None:
    verify_checkpoint(pair[2])
    record = CompressionRecord.model_validate_json((pair[2] / "spallm_report.json").read_text())
    assert record.base_digest == read_sketch_config(pair[2]).base_digest


def test_only_tables_and_norms_change(pair: tuple[Path, Path, Path]) -> None:
    _, plain, refined = (ShardReader(path) for path in pair)
    assert set(plain) == set(refined)
    changed = {name for name in plain if not torch.equal(plain.read(name), refined.read(name))}
    linears = {name for name in plain if name.endswith(TABLES) and "embed" not in name}
    norms = {name for name in plain if "norm" in name}
    assert linears | norms <= changed
    # Codes only where their table was sorted anew.
    assert all(name.endswith(CODES) for name in changed - linears - norms)
    assert not any("embed" in name for name in changed)


def test_everything_keeps_the_type_it_was_stored_in(pair: tuple[Path, Path, Path]) -> None:
    source, plain, refined = (ShardReader(path) for path in pair)
    for name in refined:
        assert refined.read(name).dtype == plain.read(name).dtype
        if name in source:
            assert refined.read(name).dtype == source.read(name).dtype
            assert refined.shape(name) == source.shape(name)
    assert refined.read("model.norm.weight").dtype == torch.bfloat16
