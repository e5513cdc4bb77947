"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NAME = sa.String(64)
_DIGEST = sa.String(64)
_COUNT = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_MOMENT = sa.DateTime(timezone=True)

_SQLITE_TRIGGERS = (
    "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
    "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
    # INSERT OR REPLACE deletes without asking the trigger above.
    "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
    "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
)
_POSTGRESQL_TRIGGERS = (
    "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$",
    "CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE ON audit "
    "FOR EACH ROW EXECUTE FUNCTION audit_is_append_only()",
    "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit "
    "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
)


def upgrade() -> None:
    """Make all tables of the first release."""
    _tenancy()
    _versions()
    _records()


def _tenancy() -> None:
    locks = op.create_table("locks", sa.Column("name", sa.String(32), primary_key=True))
    op.bulk_insert(locks, [{"name": "blobs"}, {"name": "keys"}])
    op.create_table(
        "tenants",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("suspended", sa.Boolean, nullable=False),
        sa.Column("may_use_base", sa.Boolean, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", _NAME, sa.ForeignKey("tenants.name"), nullable=False, index=True),
        sa.Column("secret_sha256", _DIGEST, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("expires_at", _MOMENT),
        sa.Column("revoked_at", _MOMENT),
    )
    op.create_table(
        "quotas",
        sa.Column("tenant", _NAME, sa.ForeignKey("tenants.name"), primary_key=True),
        sa.Column("max_bytes", sa.BigInteger),
        sa.Column("max_adapters", sa.Integer),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("tokens_per_minute", sa.Integer),
        sa.Column("concurrent_requests", sa.Integer),
    )


def _versions() -> None:
    op.create_table(
        "adapters",
        sa.Column("tenant", _NAME, sa.ForeignKey("tenants.name"), primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("digest", _DIGEST, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("base_digest", _DIGEST, nullable=False),
        sa.Column("config_blob", _DIGEST, nullable=False, index=True),
        sa.Column("tensors_blob", _DIGEST, nullable=False, index=True),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
    )
    op.create_index("adapters_digest", "adapters", ["digest"])
    op.create_table(
        "aliases",
        sa.Column("tenant", _NAME, primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name", "digest"],
            ["adapters.tenant", "adapters.name", "adapters.digest"],
            name="aliases_point_at_versions",
        ),
    )
    op.create_table(
        "releases",
        sa.Column("tenant", _NAME, primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("restores", sa.Integer),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("moved_at", _MOMENT, nullable=False),
    )
    op.create_table(
        "grants",
        sa.Column("tenant", _NAME, primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("grantee", _NAME, primary_key=True, index=True),
        sa.ForeignKeyConstraint(
            ["tenant", "name"],
            ["aliases.tenant", "aliases.name"],
            ondelete="CASCADE",
            name="grants_are_on_aliases",
        ),
    )


def _records() -> None:
    op.create_table(
        "audit",
        sa.Column("id", _COUNT, primary_key=True, autoincrement=True),
        sa.Column("at", _MOMENT, nullable=False, index=True),
        sa.Column("actor", _NAME, nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("tenant", _NAME, nullable=False, index=True),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    sqlite = op.get_bind().dialect.name == "sqlite"
    for trigger in _SQLITE_TRIGGERS if sqlite else _POSTGRESQL_TRIGGERS:
        op.execute(trigger)
    op.create_table(
        "usage",
        sa.Column("tenant", _NAME, primary_key=True),
        sa.Column("adapter", sa.String(130), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    )
