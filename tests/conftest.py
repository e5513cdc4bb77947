"""Databases that tests of the store and of the server share; what Triton must find first; and which
tests run where."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several processes: with all threads in each they would wait for one another. Before
    # torch is imported, and for what tests start, too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import psycopg
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

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


# They share a server, which takes as long to start as all that they ask it; the last one ends it.
OF_ONE_SERVER = (
    "tests/server/test_engine_routes.py", "tests/server/test_openai_client.py",
    "tests/server/test_server.py", "tests/server/test_shutdown.py",
)  # fmt: skip
# A minute or more, longest first, so that both processes end at about the same time.
LONGEST = (
    "tests/server/test_engine.py", "tests/e2e/test_smollm2.py", *OF_ONE_SERVER,
    "tests/test_native_memory.py", "tests/spallm_serve/trainer/test_run.py",
    "tests/spallm_serve/trainer/test_cli.py", "tests/adapters_store/test_processes.py",
    "tests/test_benchmarks.py", "tests/server/test_engine_benchmark.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is quick comes first."""
    places = {name: place for place, name in enumerate(LONGEST, 1)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], 0))


class _Scheduling(LoadFileScheduling):
    """A file's tests go to one process, and those of one server."""

    def _split_scope(self, nodeid: str) -> str:
        name = super()._split_scope(nodeid)
        return "one server" if name in OF_ONE_SERVER else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """In the order in which they were collected."""
    config.option.loadscopereorder = False
    return _Scheduling(config, log)
