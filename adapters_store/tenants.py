"""Tenants, and what each may use."""

from __future__ import annotations

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from spallm_serve.adapters_store.authority import expect_admin
from spallm_serve.adapters_store.catalog import Catalog, lock_tenant
from spallm_serve.adapters_store.failures import ConflictError, NotFoundError, QuotaError
from spallm_serve.adapters_store.journal import note
from spallm_serve.adapters_store.names import check_name
from spallm_serve.adapters_store.records import Principal, Quota, Tenant
from spallm_serve.adapters_store.schema import adapters, now, quotas, tenants

# For tenants whose quota nobody has set: enough to begin with, nothing to fill a disk.
DEFAULT_QUOTA = Quota(
    max_bytes=20 << 30,
    max_adapters=200,
    requests_per_minute=600,
    tokens_per_minute=200_000,
    concurrent_requests=32,
)


class Tenants:
    """Makes and suspends tenants, grants them the base, sets their quotas.

    Args:
        catalog: holds them.
        default_quota: of tenants without one of their own.
    """

    def __init__(self, catalog: Catalog, default_quota: Quota = DEFAULT_QUOTA) -> None:
        self._catalog, self._default = catalog, default_quota

    def create(self, actor: Principal, name: str, *, may_use_base: bool = False) -> Tenant:
        """Make a tenant.

        Raises:
            ForbiddenError: the actor is no admin.
            ConflictError: there is one of that name.
            StoreError: that is no name.
        """
        expect_admin(actor)
        check_name(name, "tenant")
        row = {
            "name": name,
            "created_at": now(),
            "suspended": False,
            "may_use_base": may_use_base,
        }
        try:
            with self._catalog.write() as connection:
                connection.execute(insert(tenants).values(row))
                note(connection, actor, name, "tenant.create", name, may_use_base=may_use_base)
        except IntegrityError as error:
            raise ConflictError(f"there is a tenant {name} already") from error
        return self.get(name)

    def get(self, name: str) -> Tenant:
        """A tenant.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._catalog.read() as connection:
            query = select(tenants).where(tenants.c.name == name)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFoundError(f"there is no tenant {name[:64]!r}")
        return Tenant(**row)

    def list_tenants(self, actor: Principal) -> list[Tenant]:
        """All tenants by name.

        Raises:
            ForbiddenError: the actor is no admin.
        """
        expect_admin(actor)
        with self._catalog.read() as connection:
            rows = connection.execute(select(tenants).order_by(tenants.c.name)).mappings()
            return [Tenant(**row) for row in rows]

    def suspend(self, actor: Principal, name: str, *, suspended: bool = True) -> Tenant:
        """Accept none of a tenant's keys and let nobody use what it shared; or undo that.

        Raises:
            ForbiddenError: the actor is no admin.
            NotFoundError: no such tenant.
        """
        return self._set(actor, name, "suspended", suspended, "tenant.suspend")

    def grant_base(self, actor: Principal, name: str, *, granted: bool = True) -> Tenant:
        """Let a tenant ask the base itself; or undo that.

        Raises:
            ForbiddenError: the actor is no admin.
            NotFoundError: no such tenant.
        """
        return self._set(actor, name, "may_use_base", granted, "tenant.grant_base")

    def quota(self, tenant: str) -> Quota:
        """What a tenant may use: its own quota, or the default."""
        with self._catalog.read() as connection:
            return quota_of(connection, tenant, self._default)

    def set_quota(self, actor: Principal, tenant: str, quota: Quota | None) -> Quota:
        """Give a tenant a quota of its own; None goes back to the default.

        What it has stored already stays, also where that is more.

        Raises:
            ForbiddenError: the actor is no admin.
            NotFoundError: no such tenant.
        """
        expect_admin(actor)
        with self._catalog.write() as connection:
            lock_tenant(connection, tenant)
            connection.execute(quotas.delete().where(quotas.c.tenant == tenant))
            fields = {} if quota is None else quota.model_dump()
            if quota is not None:
                connection.execute(insert(quotas).values(tenant=tenant, **fields))
            note(connection, actor, tenant, "quota.set", tenant, **fields)
        return self._default if quota is None else quota

    def _set(self, actor: Principal, name: str, column: str, value: bool, action: str) -> Tenant:
        expect_admin(actor)
        with self._catalog.write() as connection:
            lock_tenant(connection, name)
            connection.execute(
                update(tenants).where(tenants.c.name == name).values({column: value})
            )
            note(connection, actor, name, action, name, **{column: value})
        return self.get(name)


def quota_of(connection: Connection, tenant: str, default: Quota) -> Quota:
    """A tenant's own quota, or the default."""
    columns = [quotas.c[name] for name in Quota.model_fields]
    row = connection.execute(select(*columns).where(quotas.c.tenant == tenant)).mappings()
    own = row.one_or_none()
    return default if own is None else Quota(**own)


def check_room(connection: Connection, tenant: str, nbytes: int, default: Quota) -> None:
    """Refuse one more version where a tenant's quota has no room for it.

    Args:
        connection: that holds the tenant's lock, if the answer is to last.
        tenant: who puts it.
        nbytes: of the new version.
        default: quota of tenants without one of their own.

    Raises:
        QuotaError: says how much there is and may be.
    """
    quota = quota_of(connection, tenant, default)
    held = select(func.count(), func.coalesce(func.sum(adapters.c.nbytes), 0))
    count, used = connection.execute(held.where(adapters.c.tenant == tenant)).one()
    if quota.max_adapters is not None and count + 1 > quota.max_adapters:
        raise QuotaError(
            f"{tenant} keeps {count} adapter versions and may keep {quota.max_adapters}; delete "
            "some that are not needed"
        )
    if quota.max_bytes is not None and used + nbytes > quota.max_bytes:
        raise QuotaError(
            f"{tenant} stores {used:,} bytes and may store {quota.max_bytes:,}: there is no room "
            f"for {nbytes:,} more; delete versions that are not needed"
        )
