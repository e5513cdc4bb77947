"""Settings, presets and explicit choices."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from spallm_serve.errors import UserError
from spallm_serve.trainer.sparselora.plan import SparsityPlan, resolve_plan
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings


def plan(sparsity: object, layers: int) -> SparsityPlan:
    return resolve_plan(SparseLoraSettings.model_validate({"sparsity": sparsity}), layers)


def sparse_layers(sparsities: tuple[float, ...]) -> list[int]:
    return [layer for layer, sparsity in enumerate(sparsities) if sparsity]


def test_presets_of_32_layers_are_the_papers() -> None:
    o1, o2 = plan("o1", 32), plan("o2", 32)
    assert sparse_layers(o1.mlp) == list(range(17, 31))
    assert sparse_layers(o1.self_attn) == [17, 18, 19, 21, 22, 23, 25, 26, 27, 28, 29]
    assert set(o1.mlp) == {0.0, 0.97}
    assert set(o1.self_attn) == {0.0, 0.2}
    assert sparse_layers(o2.mlp) == list(range(3, 31))
    assert sparse_layers(o2.self_attn) == [
        layer for layer in range(14, 30) if layer not in (20, 24)
    ]
    assert set(o2.mlp) == {0.0, 0.99}
    assert set(o2.self_attn) == {0.0, 0.75}


@pytest.mark.parametrize("layers", [1, 2, 4, 30, 80])
@pytest.mark.parametrize("preset", ["o1", "o2"])
def test_the_ends_stay_dense_at_every_depth(preset: str, layers: int) -> None:
    found = plan(preset, layers)
    for sparsities in (found.mlp, found.self_attn):
        assert len(sparsities) == layers
        assert sparsities[0] == sparsities[-1] == 0
    assert found.is_dense == (layers < 3)


def test_presets_keep_the_relative_depth() -> None:
    assert sparse_layers(plan("o2", 4).mlp) == [1, 2]
    assert sparse_layers(plan("o1", 4).mlp) == [2]
    deep = sparse_layers(plan("o1", 63).mlp)
    assert (deep[0], deep[-1]) == (33, 60)  # places 17 (16.5, rounded) and 30


def test_an_explicit_choice_as_from_yaml() -> None:
    chosen = yaml.safe_load("{layers.3.mlp: 0.97, layers.0.self_attn: 0.2, layers.1.mlp: 0}")
    found = plan(chosen, 4)
    assert found.mlp == (0, 0, 0, 0.97)
    assert found.self_attn == (0.2, 0, 0, 0)
    assert plan({}, 4).is_dense
    assert plan("none", 4).is_dense


def test_a_layer_the_model_lacks() -> None:
    with pytest.raises(UserError, match=r"layers\.4\.mlp: the model has 4 layers, .* 0 to 3"):
        plan({"layers.4.mlp": 0.5}, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": {"layers.3.ffn": 0.5}},
        {"sparsity": {"layers.03.mlp": 0.5}},
        {"sparsity": {"layers.3.mlp": 1.0}},
        {"sparsity": {"layers.3.mlp": -0.1}},
        {"sparsity": "o3"},
        {"start": 0.2},
        {"rank": 0},
        {"dropout": 1.0},
        {"targets": []},
        {"context_attn_backward": "drop"},
        {"unknown": 1},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SparseLoraSettings.model_validate(wrong)


def test_a_plan_survives_being_saved() -> None:
    found = plan("o1", 30)
    assert SparsityPlan.from_tensors(found.tensors()) == found
