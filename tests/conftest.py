"""Databases that tests of the store and of the server share; and what Triton must find first."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several processes: with all threads in each they would wait for one another. Before
    # torch is imported, and for what tests start, too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import psycopg
import pytest
import torch

from tests.adapters_store import postgres

# Without a GPU its programs run in the interpreter, which has to be known when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Of a server of the tests' own, with ``{database}`` to be filled in."""
    where = postgres.binaries()
    if where is None:
        pytest.skip("no PostgreSQL here (initdb is neither on the path nor in /usr/lib/postgresql)")
    with postgres.running_server(where) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalogue.db'}"
    url: str = request.getfixturevalue("postgres_url")
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(url.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.format(database=name)
