"""Keys are accepted as long as they should be, and no longer; their secrets are nowhere."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from spallm_serve.adapters_store import keys as keys_module
from spallm_serve.adapters_store.failures import (
    ConflictError,
    ForbiddenError,
    NotFoundError,
    StoreError,
)
from spallm_serve.adapters_store.records import IssuedKey, Scope
from spallm_serve.adapters_store.store import AdapterStore
from tests.adapters_store.stored import ADMIN, location, opened, tenant


def test_a_key_is_its_tenants(store: AdapterStore) -> None:
    tenant(store, "acme")
    issued = store.keys.create(ADMIN, "acme", [Scope.INFERENCE], label="laptop")
    found = store.keys.authenticate(issued.secret)
    assert found is not None
    assert (found.tenant, found.scopes, found.key_id) == ("acme", {"inference"}, issued.key.id)
    assert found.may(Scope.INFERENCE) and not found.may(Scope.ADAPTERS)
    assert issued.secret not in repr(issued)
    listed = store.keys.list_keys(ADMIN, "acme")
    assert listed == [issued.key] and issued.secret not in listed[0].model_dump_json()


def test_what_is_no_key(store: AdapterStore) -> None:
    tenant(store, "acme")
    secret = store.keys.create(ADMIN, "acme", [Scope.ADMIN]).secret
    other = "A" if secret[-1] != "A" else "B"
    for bearer in (
        "", "x", secret[:-1], secret + "A", secret[:-1] + other, secret.upper(), secret + "\n",
        secret.replace(secret[7:19], "0" * 12), "spallm_" + "0" * 12 + "_" + "A" * 43, "é" * 63,
        secret[:19],
    ):  # fmt: skip
        assert store.keys.authenticate(bearer) is None, bearer


def test_the_end_of_a_key(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant(store, "acme")
    soon = datetime.now(UTC) + timedelta(hours=1)
    brief = store.keys.create(ADMIN, "acme", [Scope.INFERENCE], expires_at=soon)
    lasting = store.keys.create(ADMIN, "acme", [Scope.INFERENCE])
    assert brief.key.expires_at == soon

    def accepted(issued: IssuedKey) -> bool:
        return store.keys.authenticate(issued.secret) is not None

    assert accepted(brief) and accepted(lasting)
    store.tenants.suspend(ADMIN, "acme")
    assert not accepted(brief) and not accepted(lasting)
    store.tenants.suspend(ADMIN, "acme", suspended=False)
    assert accepted(lasting)
    monkeypatch.setattr(keys_module, "now", lambda: soon)
    assert not accepted(brief) and accepted(lasting)
    store.keys.revoke(ADMIN, lasting.key.id)
    assert not accepted(lasting)
    again = store.keys.revoke(ADMIN, lasting.key.id)
    assert again.revoked_at == soon
    revocations = store.audit.entries(ADMIN, action="key.revoke")
    assert [entry.subject for entry in revocations] == [lasting.key.id]


def test_only_admins_make_keys(store: AdapterStore) -> None:
    acme = tenant(store, "acme")
    with pytest.raises(ForbiddenError):
        store.keys.create(acme, "acme", [Scope.INFERENCE])
    with pytest.raises(ForbiddenError):
        store.keys.revoke(acme, "0" * 12)
    with pytest.raises(ForbiddenError):
        store.keys.list_keys(acme)
    with pytest.raises(ForbiddenError):
        store.tenants.create(acme, "beta")
    with pytest.raises(ForbiddenError):
        store.tenants.set_quota(acme, "acme", None)
    with pytest.raises(NotFoundError):
        store.keys.create(ADMIN, "nobody", [Scope.INFERENCE])
    with pytest.raises(NotFoundError):
        store.keys.revoke(ADMIN, "0" * 12)
    with pytest.raises(ConflictError, match="already"):
        store.tenants.create(ADMIN, "acme")
    past = datetime.now(UTC) - timedelta(seconds=1)
    for bad in ({"scopes": []}, {"label": "x" * 201}, {"expires_at": past}):
        with pytest.raises(StoreError):
            store.keys.create(ADMIN, "acme", **{"scopes": [Scope.INFERENCE], **bad})


def test_the_first_key_is_made_once(database: str, tmp_path: Path) -> None:
    """Also where several processes start at once (here: threads with connections of their own)."""
    found: list[IssuedKey | None] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        with opened(location(tmp_path, database)) as store:
            barrier.wait(30)
            found.append(store.keys.bootstrap())

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [issued for issued in found if issued is not None]
    assert len(found) == 4 and len(made) == 1
    with opened(location(tmp_path, database)) as store:
        principal = store.keys.authenticate(made[0].secret)
        assert principal is not None and principal.may(Scope.ADMIN)
        assert store.keys.bootstrap() is None
        store.keys.revoke(principal, principal.key_id)
        assert store.keys.bootstrap() is None  # never again, or revoking would open a door
