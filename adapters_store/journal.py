"""The audit log: who did what. Entries are added in the transaction of the deed itself."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, insert, select

from spallm_serve.adapters_store.catalog import Catalog
from spallm_serve.adapters_store.failures import ForbiddenError
from spallm_serve.adapters_store.records import AuditEntry, Principal, Scope
from spallm_serve.adapters_store.schema import audit, now

LARGEST_PAGE = 1000


def note(
    connection: Connection,
    actor: Principal,
    tenant: str,
    action: str,
    subject: str,
    **details: str | int | bool | None,
) -> None:
    """Add an entry (arguments: as :class:`AuditEntry` has them)."""
    row = {
        "at": now(),
        "actor": actor.tenant,
        "key_id": actor.key_id,
        "tenant": tenant,
        "action": action,
        "subject": subject,
        "details": details,
    }
    connection.execute(insert(audit).values(row))


class Journal:
    """Reads the audit log.

    Args:
        catalog: holds it.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def entries(
        self,
        actor: Principal,
        *,
        tenant: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[AuditEntry]:
        """Entries in the order they were made.

        Args:
            actor: sees what was done to its own tenant; an admin everything.
            tenant: only what was done to this one's things.
            action: only this one.
            since: only from then on.
            after: only entries with a larger id: the last one of the page before.
            limit: how many at most, up to :data:`LARGEST_PAGE`.

        Raises:
            ForbiddenError: another's entries are asked for without being an admin.
        """
        if not actor.may(Scope.ADMIN):
            if tenant not in (None, actor.tenant):
                raise ForbiddenError("only an admin reads the audit log of other tenants")
            tenant = actor.tenant
        query = select(audit).where(audit.c.id > after).order_by(audit.c.id)
        if tenant is not None:
            query = query.where(audit.c.tenant == tenant)
        if action is not None:
            query = query.where(audit.c.action == action)
        if since is not None:
            query = query.where(audit.c.at >= since)
        with self._catalog.read() as connection:
            rows = connection.execute(query.limit(min(limit, LARGEST_PAGE))).mappings()
            return [AuditEntry(**row) for row in rows]
