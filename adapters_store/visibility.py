"""What a tenant sees and may use: its own adapters, and others' releases shared with it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, or_, select

from spallm_serve.adapters_store.names import Reference
from spallm_serve.adapters_store.records import AdapterInfo, Version
from spallm_serve.adapters_store.schema import adapters, aliases, grants, tenants

_RELEASED = and_(
    aliases.c.tenant == adapters.c.tenant,
    aliases.c.name == adapters.c.name,
    aliases.c.digest == adapters.c.digest,
)


def find_version(
    connection: Connection, tenant: str, reference: Reference, base_digest: str | None
) -> Version | None:
    """The one version that a reference of a tenant stands for; None for none, or several.

    An owner may name every version, others only the one that is released.

    Args:
        connection: to the catalogue.
        tenant: who asks.
        reference: what for.
        base_digest: only versions of this base; None for any.
    """
    owner = tenant if reference.owner is None else reference.owner
    conditions = [adapters.c.tenant == owner, adapters.c.name == reference.name]
    if base_digest is not None:
        conditions.append(adapters.c.base_digest == base_digest)
    if reference.digest_start is not None:
        conditions.append(adapters.c.digest.startswith(reference.digest_start))
    query = select(adapters)
    if owner != tenant:
        query = query.join(aliases, _RELEASED)
        conditions.append(_shared_with(tenant))
    elif reference.digest_start is None:
        query = query.join(aliases, _RELEASED)
    rows = connection.execute(query.where(*conditions).limit(2)).all()
    return _version(rows[0]) if len(rows) == 1 else None


def visible(
    connection: Connection, tenant: str, owner: str | None = None, name: str | None = None
) -> list[AdapterInfo]:
    """What a tenant may see, its own first, by owner and name.

    Args:
        connection: to the catalogue.
        tenant: who asks.
        owner, name: only this one's, only of this name.
    """
    found = []
    if owner in (None, tenant):
        found += _own(connection, tenant, name)
    if owner != tenant:
        found += _of_others(connection, tenant, owner, name)
    return found


def _own(connection: Connection, tenant: str, name: str | None) -> list[AdapterInfo]:
    def of_tenant(column: Any, names: Any) -> tuple[ColumnElement[bool], ...]:
        return (column == tenant,) if name is None else (column == tenant, names == name)

    query = select(adapters).where(*of_tenant(adapters.c.tenant, adapters.c.name))
    versions: dict[str, list[Version]] = {}
    ordered = query.order_by(adapters.c.name, adapters.c.created_at.desc(), adapters.c.digest)
    for row in connection.execute(ordered):
        versions.setdefault(row.name, []).append(_version(row))
    named = select(aliases).where(*of_tenant(aliases.c.tenant, aliases.c.name))
    alias_of = {row.name: row for row in connection.execute(named)}
    shared: dict[str, list[str]] = {}
    granted = select(grants).where(*of_tenant(grants.c.tenant, grants.c.name))
    for row in connection.execute(granted.order_by(grants.c.grantee)):
        shared.setdefault(row.name, []).append(row.grantee)
    found = []
    for each, those in versions.items():
        alias = alias_of.get(each)
        digest = None if alias is None else alias.digest
        found.append(
            AdapterInfo(
                owner=tenant,
                name=each,
                released=next((one for one in those if one.digest == digest), None),
                revision=None if alias is None else alias.revision,
                versions=tuple(those),
                public=alias is not None and alias.public,
                shared_with=tuple(shared.get(each, ())),
            )
        )
    return found


def _of_others(
    connection: Connection, tenant: str, owner: str | None, name: str | None
) -> list[AdapterInfo]:
    query = (
        select(adapters, aliases.c.revision, aliases.c.public)
        .join(aliases, _RELEASED)
        .where(adapters.c.tenant != tenant, _shared_with(tenant))
        .order_by(adapters.c.tenant, adapters.c.name)
    )
    if owner is not None:
        query = query.where(adapters.c.tenant == owner)
    if name is not None:
        query = query.where(adapters.c.name == name)
    found = []
    for row in connection.execute(query):
        version = _version(row)
        found.append(
            AdapterInfo(
                owner=version.owner,
                name=version.name,
                released=version,
                revision=row.revision,
                versions=(version,),
                public=row.public,
                shared_with=(),
            )
        )
    return found


def _shared_with(tenant: str) -> ColumnElement[bool]:
    """Whether an alias is public or granted to a tenant, and its owner in good standing."""
    granted = exists().where(
        grants.c.tenant == aliases.c.tenant,
        grants.c.name == aliases.c.name,
        grants.c.grantee == tenant,
    )
    standing = exists().where(tenants.c.name == aliases.c.tenant, ~tenants.c.suspended)
    return and_(or_(aliases.c.public, granted), standing)


def _version(row: Any) -> Version:
    return Version(
        owner=row.tenant,
        name=row.name,
        digest=row.digest,
        kind=row.kind,
        base_digest=row.base_digest,
        nbytes=row.nbytes,
        created_at=row.created_at,
    )
