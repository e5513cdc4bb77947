"""The catalogue's tables are those of the schema, and strangers' databases are refused."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from spallm_serve.adapters_store.catalog import Catalog
from spallm_serve.adapters_store.failures import StoreError, UnavailableError
from spallm_serve.adapters_store.schema import metadata
from tests.adapters_store.stored import location, lut, opened, tenant


def test_the_migrations_make_the_schema(database: str) -> None:
    Catalog(database).close()
    catalog = Catalog(database)  # what is up to date is left as it is
    with catalog.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    catalog.close()


def test_a_release_cannot_point_at_nothing(database: str, tmp_path: Path) -> None:
    with opened(location(tmp_path, database)) as store:
        acme = tenant(store, "acme")
        store.put(acme, "acme", "support", *lut().write(tmp_path / "upload"))
    catalog = Catalog(database)
    for attempt in ("DELETE FROM adapters", "UPDATE aliases SET digest = 'x'"):
        with pytest.raises(IntegrityError), catalog.write() as connection:
            connection.execute(text(attempt))
    catalog.close()


def test_a_failed_write_is_undone(database: str) -> None:
    catalog = Catalog(database)
    with pytest.raises(ZeroDivisionError), catalog.write() as connection:
        connection.execute(text("INSERT INTO locks VALUES ('x')"))
        _ = 1 // 0
    with catalog.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM locks")).scalar_one() == 2
    catalog.close()


def test_sqlite_is_set_up_to_last(tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalogue.db'}")
    for begin in (catalog.read, catalog.write):
        with begin() as connection:
            pragmas = {
                name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        expected = {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
            "busy_timeout": 20000,
        }
        assert pragmas == expected
    catalog.close()


def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    """They change its journal at once, which SQLite refuses instead of waiting."""
    for round_ in range(20):
        url = f"sqlite:///{tmp_path / f'{round_}.db'}"
        together = threading.Barrier(6)

        def start(url: str = url, together: threading.Barrier = together) -> None:
            together.wait(30)
            Catalog(url).close()

        with ThreadPoolExecutor(6) as pool:
            for opening in [pool.submit(start) for _ in range(6)]:
                opening.result()


def test_a_catalogue_of_a_later_release(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.db"
    Catalog(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreError, match="another release"):
        Catalog(f"sqlite:///{path}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "no SQLAlchemy URL"),
        ("mysql://user:hidden@host/x", "expected sqlite"),
        ("sqlite+nosuch:///x", "no SQLAlchemy URL"),
        ("sqlite:////nowhere/at/all.db", "fails"),
        ("postgresql://user:hidden@127.0.0.1:1/x", "fails"),
    ],
)
def test_no_catalogue(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        Catalog(url)
    assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_database_that_stays_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spallm_serve.adapters_store.catalog._BUSY_MILLISECONDS", 50)
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalogue.db'}")
    with catalog.write():
        with pytest.raises(UnavailableError, match="locked"), catalog.write():
            pass
        with catalog.read() as connection:  # reading goes on
            assert connection.execute(text("SELECT count(*) FROM locks")).scalar_one() == 2
    catalog.close()
