"""What the engine leaves behind in the process that starts it is put right."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def same_environment_afterwards() -> Iterator[None]:
    """vLLM sets variables for its workers, LD_PRELOAD among them, which other programs die of."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
