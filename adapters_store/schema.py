"""The catalogue's tables.

``migrations/`` makes them; a test holds the two against each other.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

metadata = MetaData()


class Moment(TypeDecorator[datetime]):
    """A time in UTC; SQLite itself would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        found: datetime = value.replace(tzinfo=UTC) if value.tzinfo is None else value
        return found.astimezone(UTC)


def now() -> datetime:
    """The time that rows are stamped with."""
    return datetime.now(UTC)


def today() -> date:
    """The day, in UTC, that usage is counted under."""
    return now().date()


_NAME, _DIGEST = String(64), String(64)
# SQLite numbers rows by itself only where the column is called INTEGER.
_COUNT = BigInteger().with_variant(Integer, "sqlite")

# One row for each thing that writers of the whole store take turns at.
locks = Table("locks", metadata, Column("name", String(32), primary_key=True))

tenants = Table(
    "tenants",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("created_at", Moment, nullable=False),
    Column("suspended", Boolean, nullable=False),
    Column("may_use_base", Boolean, nullable=False),
)

# The secret itself is nowhere, only its hash; the id, its open beginning, finds the row.
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", _NAME, ForeignKey("tenants.name"), nullable=False, index=True),
    Column("secret_sha256", _DIGEST, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("label", String(200), nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
)

# Null is no limit. A tenant without a row has the store's defaults.
quotas = Table(
    "quotas",
    metadata,
    Column("tenant", _NAME, ForeignKey("tenants.name"), primary_key=True),
    Column("max_bytes", BigInteger),
    Column("max_adapters", Integer),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("concurrent_requests", Integer),
)

# The versions of every adapter.
adapters = Table(
    "adapters",
    metadata,
    Column("tenant", _NAME, ForeignKey("tenants.name"), primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("digest", _DIGEST, primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("base_digest", _DIGEST, nullable=False),
    Column("config_blob", _DIGEST, nullable=False, index=True),
    Column("tensors_blob", _DIGEST, nullable=False, index=True),
    Column("nbytes", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
)
Index("adapters_digest", adapters.c.digest)

# Which version of an adapter is released. The constraint keeps a release from pointing at nothing.
aliases = Table(
    "aliases",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("digest", _DIGEST, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("public", Boolean, nullable=False),
    ForeignKeyConstraint(
        ["tenant", "name", "digest"],
        ["adapters.tenant", "adapters.name", "adapters.digest"],
        name="aliases_point_at_versions",
    ),
)

# Every release ever; it outlives the versions. ``restores`` is the revision a rollback went to.
releases = Table(
    "releases",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("digest", _DIGEST, nullable=False),
    Column("restores", Integer),
    Column("key_id", String(16), nullable=False),
    Column("moved_at", Moment, nullable=False),
)

# Who else may use a release. The grantee is free text: that a name can be granted to does not tell
# which tenants there are.
grants = Table(
    "grants",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("grantee", _NAME, primary_key=True, index=True),
    ForeignKeyConstraint(
        ["tenant", "name"],
        ["aliases.tenant", "aliases.name"],
        ondelete="CASCADE",
        name="grants_are_on_aliases",
    ),
)

# Rows are only ever added: triggers refuse the rest.
audit = Table(
    "audit",
    metadata,
    Column("id", _COUNT, primary_key=True, autoincrement=True),
    Column("at", Moment, nullable=False, index=True),
    Column("actor", _NAME, nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("tenant", _NAME, nullable=False, index=True),
    Column("action", String(64), nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", JSON, nullable=False),
    sqlite_autoincrement=True,
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("adapter", String(130), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
