"""Backends and numbers of threads that the kernels' tests run with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cases import (
    BACKENDS,
    force,
)


@pytest.fixture(autouse=True)
def restored_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
