"""What tenants used, by adapter and day."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from spallm_serve.adapters_store.catalog import Catalog
from spallm_serve.adapters_store.failures import ForbiddenError
from spallm_serve.adapters_store.names import check_name
from spallm_serve.adapters_store.records import Principal, Scope, UsageRow
from spallm_serve.adapters_store.schema import usage

_KEY = ("tenant", "adapter", "day")
_COUNTS = ("requests", "prompt_tokens", "completion_tokens")


class Usage:
    """Counts usage and reports it.

    Args:
        catalog: holds the counts.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def record(self, rows: Iterable[UsageRow]) -> None:
        """Add to what is counted already; all rows, or none if it fails.

        A server gathers the requests of some seconds and records them together: every call is a
        transaction that waits for the disk.
        """
        # In one order everywhere, so that two processes never wait for each other's rows.
        ordered = sorted(rows, key=lambda row: (row.tenant, row.adapter, row.day))
        if not ordered:
            return
        with self._catalog.write() as connection:
            for row in ordered:
                _add(connection, row)

    def report(
        self,
        actor: Principal,
        *,
        tenant: str | None = None,
        first: date | None = None,
        last: date | None = None,
    ) -> list[UsageRow]:
        """Usage by tenant, adapter and day, in that order.

        Args:
            actor: sees its own; an admin everybody's.
            tenant: only this one's.
            first, last: days to begin and end with.

        Raises:
            ForbiddenError: another's usage is asked for without being an admin.
            StoreError: not a tenant's name.
        """
        if not actor.may(Scope.ADMIN):
            if tenant not in (None, actor.tenant):
                raise ForbiddenError("only an admin sees the usage of other tenants")
            tenant = actor.tenant
        query = select(usage).order_by(usage.c.tenant, usage.c.adapter, usage.c.day)
        if tenant is not None:
            query = query.where(usage.c.tenant == check_name(tenant, "tenant"))
        if first is not None:
            query = query.where(usage.c.day >= first)
        if last is not None:
            query = query.where(usage.c.day <= last)
        with self._catalog.read() as connection:
            return [UsageRow(**row) for row in connection.execute(query).mappings()]


def _add(connection: Connection, row: UsageRow) -> None:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    new = dialect.insert(usage).values(row.model_dump())
    sums = {name: usage.c[name] + new.excluded[name] for name in _COUNTS}
    connection.execute(new.on_conflict_do_update(index_elements=_KEY, set_=sums))
