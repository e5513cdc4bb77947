"""The store as its users see it, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DatabaseError

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.adapters_store.failures import (
    ConflictError,
    ForbiddenError,
    NotFoundError,
    QuotaError,
    RejectedError,
    StoreError,
)
from spallm_serve.adapters_store.records import Principal, Quota, Scope, UsageRow
from spallm_serve.adapters_store.store import AdapterStore
from tests.adapters_store.stored import (
    ADMIN,
    BASE_DIGEST,
    BASE_NAME,
    KINDS,
    MANIFEST,
    Upload,
    blob_count,
    location,
    lut,
    opened,
    tenant,
)


def put(store: AdapterStore, actor: Principal, name: str, upload: Upload, where: Path) -> str:
    """The digest."""
    return store.put(actor, actor.tenant, name, *upload.write(where / "upload")).version.digest


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_can_be_asked_for_and_loaded(
    kind: str, store: AdapterStore, tmp_path: Path
) -> None:
    acme = tenant(store, "acme")
    result = store.put(acme, "acme", "support", *KINDS[kind]().write(tmp_path / "upload"))
    digest = result.version.digest
    assert result.created and result.released
    for field in ("support", "acme/support", f"support@{digest[:4]}", f"acme/support@{digest}"):
        found = store.adapters.resolve("acme", field)
        assert found is not None and found.digest == digest and not found.is_base
        assert found.engine_name == f"acme/support@{digest}"
    folder = store.local_folder(digest)
    adapter = read_adapter(folder, BASE_DIGEST)
    assert adapter_digest(adapter) == digest
    assert {path.stat().st_mode & 0o222 for path in (folder, *folder.iterdir())} == {0}
    assert store.local_folder(digest) == folder


def test_the_same_again_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    first = store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
    store.tenants.set_quota(ADMIN, "acme", Quota(max_adapters=1, max_bytes=first.version.nbytes))
    entries = store.audit.entries(ADMIN)
    again = store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
    assert (again.created, again.version) == (False, first.version)
    assert store.audit.entries(ADMIN) == entries
    assert len(store.adapters.history(acme, "acme", "support")) == 1


def test_a_put_without_release_is_seen_by_its_owner_only(
    store: AdapterStore, tmp_path: Path
) -> None:
    acme, _ = tenant(store, "acme"), tenant(store, "beta")
    old = put(store, acme, "support", lut(0), tmp_path)
    store.adapters.share(acme, "acme", "support", "beta")
    paths = lut(1).write(tmp_path / "upload")
    result = store.put(acme, "acme", "support", *paths, release_it=False)
    new = result.version.digest
    assert not result.released and old != new
    for field in ("acme/support", f"acme/support@{old[:8]}"):
        found = store.adapters.resolve("beta", field)
        assert found is not None and found.digest == old
    assert store.adapters.resolve("beta", f"acme/support@{new}") is None
    mine = store.adapters.resolve("acme", f"support@{new[:8]}")
    assert mine is not None and mine.digest == new
    seen = store.adapters.get("beta", "acme", "support")
    assert [version.digest for version in seen.versions] == [old] and not seen.shared_with
    own = store.adapters.get("acme", "acme", "support")
    assert {version.digest for version in own.versions} == {old, new}
    assert own.shared_with == ("beta",)


def test_moving_compares(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    a = put(store, acme, "support", lut(0), tmp_path)
    b = put(store, acme, "support", lut(1), tmp_path)
    with pytest.raises(ConflictError, match=f"{b[:12]}, not for {a[:12]}"):
        store.adapters.move(acme, "acme", "support", a, expected=a)
    with pytest.raises(ConflictError):
        store.adapters.move(acme, "acme", "support", a, expected=None)
    assert store.adapters.move(acme, "acme", "support", a, expected=b).revision == 3
    with pytest.raises(NotFoundError):
        store.adapters.move(acme, "acme", "support", "0" * 64, expected=a)
    moves = store.adapters.history(acme, "acme", "support")
    assert [move.digest for move in moves] == [a, b, a]


def test_rolling_back_goes_further_back_each_time(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    a, b, c, d = (put(store, acme, "support", lut(seed), tmp_path) for seed in range(4))
    store.adapters.delete_version(acme, "acme", "support", b)
    with pytest.raises(ConflictError):
        store.adapters.rollback(acme, "acme", "support", expected=a)
    assert store.adapters.rollback(acme, "acme", "support", expected=d).digest == c
    back = store.adapters.rollback(acme, "acme", "support")
    assert (back.digest, back.restores, back.revision) == (a, 1, 6)
    with pytest.raises(ConflictError, match="no earlier release"):
        store.adapters.rollback(acme, "acme", "support")
    store.adapters.move(acme, "acme", "support", d, expected=a)
    assert store.adapters.rollback(acme, "acme", "support").digest == c


def test_others_see_nothing(store: AdapterStore, tmp_path: Path) -> None:
    acme, beta = tenant(store, "acme"), tenant(store, "beta")
    digest = put(store, acme, "support", lut(), tmp_path)
    adapters = store.adapters
    said = []
    for name in ("support", "nothing"):  # what is there and what is not
        assert adapters.resolve("beta", f"acme/{name}") is None
        for attempt in (
            lambda name=name: adapters.get("beta", "acme", name),
            lambda name=name: adapters.move(beta, "acme", name, digest, None),
            lambda name=name: adapters.rollback(beta, "acme", name),
            lambda name=name: adapters.history(beta, "acme", name),
            lambda name=name: adapters.delete(beta, "acme", name),
            lambda name=name: adapters.delete_version(beta, "acme", name, digest),
            lambda name=name: adapters.share(beta, "acme", name, "beta"),
            lambda name=name: adapters.publish(beta, "acme", name),
            lambda name=name: store.put(beta, "acme", name, *lut(1).write(tmp_path / "upload")),
        ):
            with pytest.raises(NotFoundError) as caught:
                attempt()
            said.append(str(caught.value).replace(name, "NAME"))
    assert len(set(said)) == 1
    assert adapters.list_visible("beta") == []
    reader = beta.model_copy(update={"scopes": frozenset({Scope.INFERENCE})})
    with pytest.raises(ForbiddenError):
        store.put(reader, "beta", "support", *lut(1).write(tmp_path / "upload"))
    with pytest.raises(ForbiddenError):
        store.validate(reader, *lut(1).write(tmp_path / "upload"))


def test_granting_and_taking_back(store: AdapterStore, tmp_path: Path) -> None:
    acme, _ = tenant(store, "acme"), tenant(store, "beta")
    put(store, acme, "support", lut(), tmp_path)

    def usable() -> bool:
        return store.adapters.resolve("beta", "acme/support") is not None

    store.adapters.share(acme, "acme", "support", "beta")
    store.adapters.share(acme, "acme", "support", "beta")
    assert usable()
    assert store.adapters.resolve("beta", "support") is None  # its own name, not another's
    store.tenants.suspend(ADMIN, "acme")
    assert not usable()
    store.tenants.suspend(ADMIN, "acme", suspended=False)
    store.adapters.unshare(acme, "acme", "support", "beta")
    assert not usable()
    store.adapters.publish(acme, "acme", "support")
    assert usable() and store.adapters.list_visible("beta")[0].public
    store.adapters.publish(acme, "acme", "support", public=False)
    assert not usable()
    store.adapters.share(acme, "acme", "support", "nobody")  # is not told that there is none
    with pytest.raises(NotFoundError, match="no tenant nobody"):
        store.adapters.share(ADMIN, "acme", "support", "nobody")
    # A grant ends with its adapter, and does not come back with the name.
    store.adapters.share(acme, "acme", "support", "beta")
    store.adapters.delete(acme, "acme", "support")
    put(store, acme, "support", lut(), tmp_path)
    assert not usable()


def test_the_base(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    assert store.adapters.resolve("acme", BASE_NAME) is None
    store.tenants.grant_base(ADMIN, "acme")
    found = store.adapters.resolve("acme", BASE_NAME)
    assert found is not None and found.is_base and found.engine_name == BASE_NAME
    assert store.adapters.resolve("nobody", BASE_NAME) is None
    with pytest.raises(StoreError, match="what the base is called"):
        put(store, acme, BASE_NAME, lut(), tmp_path)


def test_versions_of_another_base_are_not_served(
    store: AdapterStore, database: str, tmp_path: Path
) -> None:
    acme = tenant(store, "acme")
    digest = put(store, acme, "support", lut(), tmp_path)
    other = MANIFEST.model_copy(update={"base_digest": "0" * 64})
    with opened(location(tmp_path, database), other) as elsewhere:
        assert elsewhere.adapters.resolve("acme", "support") is None
        assert elsewhere.adapters.resolve("acme", f"support@{digest}") is None
        with pytest.raises(RejectedError, match="only fits the codes it was trained on"):
            put(elsewhere, acme, "support", lut(), tmp_path)


def test_an_ambiguous_start_of_a_digest(tmp_path: Path) -> None:
    with opened(location(tmp_path)) as store:
        acme = tenant(store, "acme")
        seeds: dict[str, int] = {}
        for seed in range(3000):  # of 65,536 starts two are the same long before
            digest = store.validate(acme, *lut(seed).write(tmp_path / "upload")).digest
            if digest[:4] in seeds:
                break
            seeds[digest[:4]] = seed
        put(store, acme, "support", lut(seeds[digest[:4]]), tmp_path)
        assert store.adapters.resolve("acme", f"support@{digest[:4]}") is not None
        assert put(store, acme, "support", lut(seed), tmp_path) == digest
        assert store.adapters.resolve("acme", f"support@{digest[:4]}") is None
        assert store.adapters.resolve("acme", f"support@{digest}") is not None


@pytest.mark.parametrize(
    "field",
    ["", "/", "@", "support@", "support@zzzz", "support@abc", "a/b/c", "../support", "/support",
     "acme/", "SUPPORT", "support\n", "support@" + "a" * 65, "sup%", "acme/%", "x" * 5000, "é"],
)  # fmt: skip
def test_fields_that_name_nothing(field: str, tmp_path: Path) -> None:
    with opened(location(tmp_path)) as store:
        put(store, tenant(store, "acme"), "support", lut(), tmp_path)
        assert store.adapters.resolve("acme", field) is None


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "A", "a b", "a\0", "x" * 65, "é"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with opened(location(tmp_path)) as store:
        acme = tenant(store, "acme")
        with pytest.raises(StoreError, match="is no adapter name"):
            put(store, acme, name, lut(), tmp_path)
        with pytest.raises(StoreError, match="is no tenant name"):
            store.tenants.create(ADMIN, name)
        assert blob_count(tmp_path) == 0


def test_quotas(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    first = store.put(acme, "acme", "support", *lut(0).write(tmp_path / "upload")).version
    store.tenants.set_quota(ADMIN, "acme", Quota(max_adapters=1))
    with pytest.raises(QuotaError, match="may keep 1"):
        put(store, acme, "support", lut(1), tmp_path)
    store.tenants.set_quota(ADMIN, "acme", Quota(max_bytes=2 * first.nbytes - 1))
    with pytest.raises(QuotaError, match="may store"):
        put(store, acme, "support", lut(1), tmp_path)
    assert blob_count(tmp_path) == 2  # what was refused left nothing
    store.tenants.set_quota(ADMIN, "acme", Quota(max_bytes=2 * first.nbytes, max_adapters=2))
    put(store, acme, "support", lut(1), tmp_path)
    store.tenants.set_quota(ADMIN, "acme", Quota(max_bytes=10))
    with pytest.raises(QuotaError, match="in all"):
        put(store, acme, "support", lut(2), tmp_path)
    assert store.tenants.quota("acme").requests_per_minute is None
    store.tenants.set_quota(ADMIN, "acme", None)
    assert store.tenants.quota("acme").requests_per_minute == 600


def test_deleting(store: AdapterStore, tmp_path: Path) -> None:
    acme, beta = tenant(store, "acme"), tenant(store, "beta")
    old = put(store, acme, "support", lut(0), tmp_path)
    new = put(store, acme, "support", lut(1), tmp_path)
    put(store, beta, "same", lut(0), tmp_path)
    with pytest.raises(ConflictError, match="release another version first"):
        store.adapters.delete_version(acme, "acme", "support", new)
    assert store.adapters.delete_version(acme, "acme", "support", old).digest == old
    folder = store.local_folder(new)
    gone = store.adapters.delete(acme, "acme", "support")
    assert [version.digest for version in gone] == [new]
    assert store.adapters.resolve("acme", "support") is None
    with pytest.raises(NotFoundError):
        store.local_folder(new)
    with pytest.raises(NotFoundError):
        store.adapters.delete(acme, "acme", "support")
    collected = store.collect(ADMIN, grace=0)
    # Beside the tensors of both versions there is one configuration, the same for all.
    assert (collected.blobs, collected.folders) == (1, 1) and not folder.exists()
    assert adapter_digest(read_adapter(store.local_folder(old))) == old
    assert store.collect(ADMIN, grace=0).blobs == 0


def test_what_is_new_is_not_collected(store: AdapterStore, tmp_path: Path) -> None:
    acme = tenant(store, "acme")
    put(store, acme, "support", lut(), tmp_path)
    store.adapters.delete(acme, "acme", "support")
    (tmp_path / "blobs" / ".partial" / "killed").write_bytes(b"half")
    assert store.collect(ADMIN, grace=60).model_dump() == dict.fromkeys(
        ("blobs", "nbytes", "partials", "folders"), 0
    )
    assert store.collect(ADMIN, grace=0).partials == 1
    with pytest.raises(ForbiddenError):
        store.collect(acme)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_upload_whose_blobs_are_collected_meanwhile(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    acme = tenant(store, "acme")
    put_file, calls = store._blobs.put_file, []

    def put_and_lose(path: Path, *, frozen: bool = False) -> object:
        found = put_file(path, frozen=frozen)
        calls.append(found)
        if len(calls) == 2:  # both are there, the row is not
            assert store.collect(ADMIN, grace=0).blobs == 2
        return found

    monkeypatch.setattr(store._blobs, "put_file", put_and_lose)
    files = lut().write(tmp_path / "upload")
    digest = store.put(acme, "acme", "support", *files, frozen=frozen).version.digest
    assert len(calls) == 4
    assert adapter_digest(read_adapter(store.local_folder(digest))) == digest


def test_damaged_blobs_are_not_served(store: AdapterStore, tmp_path: Path) -> None:
    digest = put(store, tenant(store, "acme"), "support", lut(), tmp_path)
    for path in (tmp_path / "blobs").glob("??/*"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        store.local_folder(digest)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_the_audit_log_only_grows(store: AdapterStore, database: str, tmp_path: Path) -> None:
    acme, beta = tenant(store, "acme"), tenant(store, "beta")
    digest = put(store, acme, "support", lut(), tmp_path)
    entries = store.audit.entries(acme)
    assert [(entry.actor, entry.action) for entry in entries] == [
        ("admin", "tenant.create"),
        ("acme", "adapter.put"),
        ("acme", "adapter.release"),
    ]
    assert entries[1].subject == f"support@{digest}" and entries[1].key_id == "of-acme"
    assert [entry.action for entry in store.audit.entries(beta)] == ["tenant.create"]
    with pytest.raises(ForbiddenError):
        store.audit.entries(beta, tenant="acme")
    page = store.audit.entries(ADMIN, after=entries[0].id, limit=1)
    assert len(page) == 1 and page[0].id > entries[0].id
    assert store.audit.entries(ADMIN, since=datetime.now(UTC) + timedelta(days=1)) == []
    attempts = ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"]
    if database.startswith("sqlite"):
        attempts.append("INSERT OR REPLACE INTO audit SELECT * FROM audit")
    else:
        attempts.append("TRUNCATE audit")
    engine = create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    for attempt in attempts:
        with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(text(attempt))
    engine.dispose()
    assert store.audit.entries(acme) == entries


def test_usage(store: AdapterStore) -> None:
    acme, _ = tenant(store, "acme"), tenant(store, "beta")
    days = [date(2026, 1, 1), date(2026, 1, 2)]
    rows = [
        UsageRow(
            tenant=name, adapter=adapter, day=day, requests=1, prompt_tokens=10, completion_tokens=5
        )
        for name, adapter, day in (
            ("acme", "acme/support", days[0]),
            ("acme", "acme/support", days[0]),
            ("acme", "acme/support", days[1]),
            ("beta", "acme/support", days[0]),
        )
    ]
    store.usage.record(rows)
    store.usage.record(rows[:1])
    store.usage.record([])
    mine = store.usage.report(acme)
    assert [(row.day, row.requests, row.prompt_tokens) for row in mine] == [
        (days[0], 3, 30),
        (days[1], 1, 10),
    ]
    assert len(store.usage.report(ADMIN)) == 3
    assert len(store.usage.report(ADMIN, tenant="acme", first=days[1], last=days[1])) == 1
    with pytest.raises(ForbiddenError):
        store.usage.report(acme, tenant="beta")
