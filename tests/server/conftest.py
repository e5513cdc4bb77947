"""One server for all tests that need a whole one; and the environment as it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.location import Location
from spallm_serve.adapters_store.records import Scope
from spallm_serve.adapters_store.store import AdapterStore
from tests.server.engine_models import greedy, make_adapter, make_base, oracle
from tests.server.running_server import PROMPT, TOKENS, Server, start


@pytest.fixture(scope="module", autouse=True)
def same_environment_afterwards() -> Iterator[None]:
    """vLLM sets variables for its workers, LD_PRELOAD among them, which other programs die of."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def adapters(base: Path) -> dict[str, Path]:
    return {
        kind: make_adapter(base, kind, number + 1, base.parent / kind)
        for number, kind in enumerate(("lut", "lut-rows", "smt", "lora"))
    }


@pytest.fixture(scope="session")
def wanted(base: Path, adapters: dict[str, Path]) -> dict[str, list[int]]:
    folders: dict[str, Path | None] = {"base": None, **adapters}
    return {name: greedy(oracle(base, folder), PROMPT, TOKENS) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("data") / "store"
    process, url, said = start(base, data)
    (admin,) = re.findall(r"^\s+(spallm_\S+)", said, re.MULTILINE)
    store = AdapterStore(
        Location(str(data / "blobs"), f"sqlite:///{data / 'catalogue.db'}", data / "adapters")
    )
    keys = {}
    for tenant in ("acme", "zoo"):
        store.tenants.create(OPERATOR, tenant, may_use_base=True)
        scopes = [Scope.INFERENCE, Scope.ADAPTERS]
        keys[tenant] = store.keys.create(OPERATOR, tenant, scopes).secret
    yield Server(process, url, store, admin, keys, base, data)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
