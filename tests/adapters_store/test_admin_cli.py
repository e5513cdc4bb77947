"""``spallm-admin`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from spallm_serve.adapters_store.admin_cli import KeyScope, app
from spallm_serve.adapters_store.location import DATABASE_VARIABLE, STORE_VARIABLE, locate
from spallm_serve.adapters_store.records import Scope
from tests.adapters_store.stored import ADMIN, lut, opened, tenant


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store that the environment names."""
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.delenv(DATABASE_VARIABLE, raising=False)
    return tmp_path / "store"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def listed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_tenants_and_keys(place: Path) -> None:
    run("tenant", "create", "acme", "--base")
    assert "already" in refused("tenant", "create", "acme")
    assert "is no tenant name" in refused("tenant", "create", "../acme")
    made = run("key", "create", "acme", "--scope", "adapters", "--days", "2", "--label", "ci")
    secret = made.strip()
    with opened(locate(str(place))) as store:
        principal = store.keys.authenticate(secret)
        assert principal is not None and principal.scopes == {Scope.ADAPTERS}
    (key,) = listed("key", "list", "acme")
    assert (key["id"], key["label"]) == (principal.key_id, "ci") and key["expires_at"]
    run("tenant", "suspend", "acme")
    assert listed("tenant", "list")[0] | {"created_at": ""} == {
        "name": "acme",
        "created_at": "",
        "suspended": True,
        "may_use_base": True,
    }
    run("tenant", "suspend", "acme", "--undo")
    run("key", "revoke", key["id"])
    assert "no key" in refused("key", "revoke", "nothing")
    with opened(locate(str(place))) as store:
        assert store.keys.authenticate(secret) is None
    actions = [entry["action"] for entry in listed("audit", "--tenant", "acme")]
    assert actions == [
        "tenant.create",
        "key.create",
        "tenant.suspend",
        "tenant.suspend",
        "key.revoke",
    ]
    assert len(listed("audit", "--action", "key.create")) == 1
    assert listed("audit", "--since", "2999-01-01") == []


def test_scopes_are_the_stores() -> None:
    assert [scope.value for scope in KeyScope] == [scope.value for scope in Scope]


def test_grants(place: Path, tmp_path: Path) -> None:
    with opened(locate(str(place))) as store:
        acme = tenant(store, "acme")
        tenant(store, "beta")
        store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
    run("grant", "share", "acme/support", "beta")
    run("grant", "base", "beta")
    (shared,) = listed("grant", "list", "beta")
    assert (shared["owner"], shared["name"], shared["public"]) == ("acme", "support", False)
    assert "acme/support" in run("grant", "list", "acme")
    run("grant", "share", "acme/support", "beta", "--undo")
    assert listed("grant", "list", "beta") == []
    run("grant", "public", "acme/support")
    assert listed("grant", "list", "beta")[0]["public"]
    run("grant", "public", "acme/support", "--undo")
    assert "expected OWNER/NAME" in refused("grant", "public", "support")
    assert "no adapter acme/sales" in refused("grant", "public", "acme/sales")
    assert "no tenant nobody" in refused("grant", "share", "acme/support", "nobody")


def test_quotas_change_by_what_is_named() -> None:
    run("tenant", "create", "acme")
    default = listed("quota", "show", "acme")[0]
    run("quota", "set", "acme", "--max-adapters", "3", "--unlimited", "tokens_per_minute")
    expected = default | {"max_adapters": 3, "tokens_per_minute": None}
    assert listed("quota", "show", "acme") == [expected]
    run("quota", "set", "acme", "--max-bytes", "0")
    assert listed("quota", "show", "acme") == [expected | {"max_bytes": 0}]
    run("quota", "set", "acme", "--default")
    assert listed("quota", "show", "acme") == [default]
    assert "expected max_bytes" in refused("quota", "set", "acme", "--unlimited", "x")
    assert "no tenant" in refused("quota", "show", "nobody")


def test_garbage(place: Path, tmp_path: Path) -> None:
    with opened(locate(str(place))) as store:
        acme = tenant(store, "acme")
        store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
        store.adapters.delete(ADMIN, "acme", "support")
    assert "removed 0 blobs" in run("gc")
    assert "removed 2 blobs" in run("gc", "--grace", "0")


def test_where_a_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    usual = tmp_path / "spallm-serve"
    assert locate().database == f"sqlite:///{usual / 'catalogue.db'}"
    bucket = locate("s3://bucket/x", "postgresql://host/db")
    assert (bucket.blobs, bucket.database) == ("s3://bucket/x", "postgresql://host/db")
    assert bucket.folders == usual / "adapters"
    assert locate("here").blobs == str(Path("here").absolute() / "blobs")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refused("tenant", "list", "--store", str(tmp_path / "file"))
    assert "expected sqlite" in refused("tenant", "list", "--database", "mysql://x")
    assert "cannot hold" in refused("tenant", "list", "--database", "sqlite:////proc/x/y.db")
    (tmp_path / "junk.db").write_bytes(b"no database" * 1000)
    assert "junk.db" in refused("tenant", "list", "--database", f"sqlite:///{tmp_path}/junk.db")
