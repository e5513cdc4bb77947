"""The catalogue: a SQL database, brought to this release's tables, and its transactions."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from spallm_serve.adapters_store.failures import NotFoundError, StoreError, UnavailableError
from spallm_serve.adapters_store.schema import locks, tenants

# The store's locks: between those who begin to point at blobs (shared) and those who remove blobs;
# and between those who make the first key.
BLOBS, KEYS = "blobs", "keys"
_BUSY_MILLISECONDS = 20_000
_READS = "spallm_reads"
# PostgreSQL's advisory lock of those that migrate; any number that others do not use.
_MIGRATION_LOCK = 0x5BA11A


class Catalog:
    """Transactions on the catalogue.

    On SQLite a write takes the file's one write lock at its beginning, so what it reads cannot
    change before it commits. On PostgreSQL it locks the rows that it decides by
    (:func:`lock_tenant`, :func:`lock`).

    Args:
        url: SQLAlchemy's, ``sqlite:///path`` or ``postgresql://...``.

    Raises:
        StoreError: not such a URL, unreachable, or made by a newer release.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.shown = parsed.render_as_string(hide_password=True)
            if parsed.get_backend_name() not in ("sqlite", "postgresql"):
                raise StoreError(f"{self.shown}: expected sqlite:///PATH or postgresql://...")
            self._engine = create_engine(parsed, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError) as error:
            raise StoreError(
                "the database is no SQLAlchemy URL; expected sqlite:///PATH or postgresql://..."
            ) from error
        if self._engine.dialect.name == "sqlite":
            _set_up_sqlite(self._engine)
        try:
            self._migrate()
        except DBAPIError as error:
            raise UnavailableError(f"{self.shown}: cannot be opened ({_reason(error)})") from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and blocks no writer.

        Raises:
            UnavailableError: the database cannot be reached, or is busy for too long.
        """
        with self._available(), self._engine.connect() as connection:
            connection = connection.execution_options(**{_READS: True})
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, and undone by an exception.

        Raises:
            UnavailableError: as :meth:`read`.
        """
        with self._available(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            raise UnavailableError(f"{self.shown}: fails ({_reason(error)})") from error

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def _migrate(self) -> None:
        # Here, since only who opens a store waits for it.
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        with as_file(files(__package__) / "migrations") as scripts, self.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            config = Config()
            config.set_main_option("script_location", str(scripts).replace("%", "%%"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StoreError(
                    f"{self.shown}: was made by another release of spallm-serve ({error}); "
                    "install that or a newer one"
                ) from error


def lock_tenant(connection: Connection, tenant: str) -> Any:
    """A tenant's row, locked: its writers take turns until the transaction ends.

    Raises:
        NotFoundError: no such tenant.
    """
    query = select(tenants).where(tenants.c.name == tenant).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no tenant {tenant}")
    return row


def lock(connection: Connection, name: str, *, shared: bool = False) -> None:
    """Take one of the store's own locks until the transaction ends; before any tenant's.

    Args:
        connection: of the transaction that holds it.
        name: :data:`BLOBS` or :data:`KEYS`.
        shared: whether others may hold it too, if they share it.
    """
    query = select(locks).where(locks.c.name == name).with_for_update(read=shared)
    connection.execute(query).one()


def _reason(error: DBAPIError) -> str:
    """The driver's own words, of which the first line is for people."""
    return str(error.orig).strip().partition("\n")[0]


def _set_up_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        # Transactions begin as `began` says, not when the driver thinks fit.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        _write_ahead(connection)
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        reads = connection.get_execution_options().get(_READS, False)
        # A write that began as a read could find that another has written meanwhile, and fail.
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _write_ahead(connection: Any) -> None:
    """Have the file keep a write-ahead log.

    Two that change a new file at once are in each other's way, and SQLite then fails at once
    instead of waiting: each would wait for the other for ever.

    Raises:
        sqlite3.OperationalError: another failure, or the file stays busy for too long.
    """
    deadline = time.monotonic() + _BUSY_MILLISECONDS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
        # Unequal waits, or those that met would meet again.
        time.sleep(random.uniform(0.001, 0.02))
