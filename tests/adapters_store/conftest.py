"""Bases that the store's tests share, each dense and compressed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from tests.adapters_store.stored import location, opened
from tests.tiny_models import save_tiny, save_tokenizer

# Between them: biases, an untied head, tied and compressed embeddings, Conv1D.
FORMATS: dict[str, dict[str, Any]] = {
    "llama": {"bits": 3, "groups_per_row": 2},
    "llama-tied": {"bits": 4, "embeddings": 4},
    "gpt2": {"bits": 2},
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Directories by architecture, and in that ``dense`` and ``sketched``."""
    found: dict[str, dict[str, Path]] = {}
    for name, chosen in FORMATS.items():
        parent = tmp_path_factory.mktemp(name)
        dense = save_tokenizer(save_tiny(name, parent / "dense", shard_size="80KB"))
        settings = CompressSettings.model_validate(
            {"samples": 2, "seqlen": 16, "estimator_rank": 2} | chosen
        )
        compress(str(dense), parent / "sketched", settings, SilentObserver())
        found[name] = {"dense": dense, "sketched": parent / "sketched"}
    return found


@pytest.fixture(scope="session")
def dense(bases: dict[str, dict[str, Path]]) -> Path:
    """A Llama with biases, in float32 and several shards."""
    return bases["llama"]["dense"]


@pytest.fixture(scope="session")
def sketched(bases: dict[str, dict[str, Path]]) -> Path:
    """The same in 3 bits, two groups a row."""
    return bases["llama"]["sketched"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Calibration text."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, 0123456789 times. " * 20)
    return path


@pytest.fixture
def store(database: str, tmp_path: Path) -> Iterator[AdapterStore]:
    """An empty store, on each kind of database."""
    with opened(location(tmp_path, database)) as found:
        yield found
