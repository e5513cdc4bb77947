"""Estimators: against the whole SVD, from checkpoints, in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spallm_serve.checkpoint import ESTIMATOR_FILE
from spallm_serve.errors import UserError
from spallm_serve.layers import SketchedLinear
from spallm_serve.sketch import Sketch
from spallm_serve.svd import svd_estimator
from spallm_serve.trainer.sparselora import estimators
from spallm_serve.trainer.sparselora.estimators import dense_weight, load_estimators


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def linear(rows: int = 12, columns: int = 9, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = weight(rows, columns, seed)
    return layer


def test_the_weight_of_a_sketch() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (6, 12), generator=generator).to(torch.uint8)
    sketch = Sketch.from_codes(codes, torch.randn(6, 2, 8, generator=generator))
    layer = SketchedLinear(12, 6, 3, 2, bias=False)
    layer.load_state_dict({"codes": sketch.planes, "tables": sketch.tables})
    layer(torch.ones(1, 12))  # which puts the codes into another layout
    assert torch.equal(dense_weight(layer), sketch.weight())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the decompositions."""
    ranks: list[int] = []

    def counted(given: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, float]:
        ranks.append(rank)
        return svd_estimator(given, rank, seed)

    monkeypatch.setattr(estimators, "svd_estimator", counted)
    return ranks


def test_made_once_and_then_read(tmp_path: Path, made: list[int]) -> None:
    cache = tmp_path / "run" / "cache.safetensors"
    linears = {"x.q_proj": linear(seed=0), "x.k_proj": linear(5, seed=1)}
    first = load_estimators(linears, 3, None, cache)
    second = load_estimators(linears, 3, None, cache)
    assert made == [3, 3]
    assert set(first) == set(second) == set(linears)
    for name in linears:
        for wanted, found in zip(first[name], second[name], strict=True):
            assert torch.equal(found, wanted)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert "x.q_proj.estimator_a" in load_file(cache)


def test_only_what_is_missing_is_made(tmp_path: Path, made: list[int]) -> None:
    cache = tmp_path / "cache.safetensors"
    both = {"q": linear(seed=0), "k": linear(seed=1)}
    load_estimators({"q": both["q"]}, 3, None, cache)
    load_estimators(both, 3, None, cache)
    load_estimators({"k": both["k"]}, 3, None, cache)
    assert made == [3, 3]


def test_other_weights_or_ranks_are_made_anew(tmp_path: Path, made: list[int]) -> None:
    cache = tmp_path / "cache.safetensors"
    load_estimators({"q": linear(seed=0)}, 3, None, cache)
    load_estimators({"q": linear(seed=1)}, 3, None, cache)
    found = load_estimators({"q": linear(seed=1)}, 4, None, cache)
    assert made == [3, 3, 4]
    assert found["q"].a.shape == (9, 4)


def test_a_checkpoints_own_come_first(tmp_path: Path, made: list[int]) -> None:
    given = {"q.estimator_a": torch.ones(9, 2), "q.estimator_b": torch.ones(2, 12)}
    save_file(given, tmp_path / ESTIMATOR_FILE)
    found = load_estimators({"q": linear(), "k": linear()}, 3, tmp_path, None)
    assert torch.equal(found["q"].a, torch.ones(9, 2))
    assert made == [3]  # for k, which the checkpoint lacks


def test_without_files_they_are_made_every_time(tmp_path: Path, made: list[int]) -> None:
    load_estimators({"q": linear()}, 3, tmp_path, None)
    load_estimators({"q": linear()}, 3, None, None)
    assert made == [3, 3]
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    save_file(
        {"q.estimator_a": torch.ones(8, 2), "q.estimator_b": torch.ones(2, 12)},
        tmp_path / ESTIMATOR_FILE,
    )
    with pytest.raises(UserError, match=r"q: factors \[8, 2\].* 9 inputs and 12 outputs"):
        load_estimators({"q": linear()}, 3, tmp_path, None)
    (tmp_path / ESTIMATOR_FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="damaged or truncated"):
        load_estimators({"q": linear()}, 3, tmp_path, None)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        load_estimators({"q": linear()}, 3, None, tmp_path / "file" / "cache.safetensors")
