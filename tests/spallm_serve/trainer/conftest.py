"""Bases and data that the trainer's tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.settings import CompressSettings
from tests.tiny_models import save_tiny, save_tokenizer


@pytest.fixture(scope="session")
def dense_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with biases and a tokenizer."""
    directory = save_tiny("llama", tmp_path_factory.mktemp("base") / "dense")
    return save_tokenizer(directory)


@pytest.fixture(scope="session")
def sketched_base(dense_base: Path) -> Path:
    """The same in 3 bits, two groups a row."""
    output = dense_base.with_name("sketched")
    settings = CompressSettings(bits=3, groups_per_row=2, samples=2, seqlen=16, estimator_rank=2)
    compress(str(dense_base), output, settings, SilentObserver())
    return output


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small sums, each with its answer."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    generator = random.Random(0)
    with path.open("w") as file:
        for _ in range(40):
            a, b = generator.randrange(50), generator.randrange(50)
            row = {"prompt": f"{a} + {b} =", "completion": f" {a + b}"}
            file.write(json.dumps(row) + "\n")
    return path
