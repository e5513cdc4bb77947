"""API keys: made once, kept as hashes, looked up by their open beginning."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from spallm_serve.adapters_store.authority import OPERATOR, expect_admin
from spallm_serve.adapters_store.catalog import KEYS, Catalog, lock, lock_tenant
from spallm_serve.adapters_store.failures import NotFoundError, StoreError
from spallm_serve.adapters_store.journal import note
from spallm_serve.adapters_store.names import check_name
from spallm_serve.adapters_store.records import IssuedKey, Key, Principal, Scope
from spallm_serve.adapters_store.schema import keys, now, tenants

# The tenant of the key that a new store begins with.
FIRST_TENANT = "admin"
_LONGEST_LABEL = 200
_SECRET_BYTES = 32
# 32 bytes are 43 characters of URL-safe base64. The beginning lets secret scanners find leaks.
_TOKEN = re.compile(r"spallm_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NO_HASH = "0" * 64


class Keys:
    """Makes, accepts and revokes keys.

    Args:
        catalog: holds them.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def authenticate(self, bearer: str) -> Principal | None:
        """Whose token it is; None for any that is not to be accepted, whatever the reason.

        Args:
            bearer: the token, without the word before it.
        """
        match = _TOKEN.fullmatch(bearer)
        if match is None:
            return None
        query = (
            select(keys, tenants.c.suspended)
            .join(tenants, tenants.c.name == keys.c.tenant)
            .where(keys.c.id == match[1])
        )
        with self._catalog.read() as connection:
            row = connection.execute(query).one_or_none()
        # Also compared where there is no such key, so that both take the same time.
        expected = _NO_HASH if row is None else row.secret_sha256
        equal = hmac.compare_digest(_hashed(bearer), expected)
        if row is None or not equal or row.revoked_at is not None or row.suspended:
            return None
        if row.expires_at is not None and row.expires_at <= now():
            return None
        return Principal(tenant=row.tenant, scopes=_scopes(row.scopes), key_id=row.id)

    def bootstrap(self) -> IssuedKey | None:
        """The first admin key of a store that has none at all; None once there was one.

        Of several processes that start together one gets it.
        """
        with self._catalog.write() as connection:
            lock(connection, KEYS)
            if connection.execute(select(func.count()).select_from(keys)).scalar_one():
                return None
            known = select(tenants.c.name).where(tenants.c.name == FIRST_TENANT)
            if connection.execute(known).one_or_none() is None:
                row = {
                    "name": FIRST_TENANT,
                    "created_at": now(),
                    "suspended": False,
                    "may_use_base": True,
                }
                connection.execute(insert(tenants).values(row))
            return _issue(connection, OPERATOR, FIRST_TENANT, {Scope.ADMIN}, "first start", None)

    def create(
        self,
        actor: Principal,
        tenant: str,
        scopes: Collection[Scope],
        *,
        label: str = "",
        expires_at: datetime | None = None,
    ) -> IssuedKey:
        """Make a key.

        Args:
            actor: an admin.
            tenant: whose key it is.
            scopes: what it is good for.
            label: words to know it by.
            expires_at: with a time zone; None for never.

        Raises:
            ForbiddenError: the actor is no admin.
            NotFoundError: no such tenant.
            StoreError: no scope, a label that is too long, or an expiry that has passed.
        """
        expect_admin(actor)
        check_name(tenant, "tenant")
        if not scopes:
            raise StoreError("a key without any scope is good for nothing")
        if len(label) > _LONGEST_LABEL:
            raise StoreError(f"a label has {_LONGEST_LABEL} characters at most, not {len(label)}")
        if expires_at is not None and expires_at <= now():
            raise StoreError(f"the key would have expired already, at {expires_at.isoformat()}")
        with self._catalog.write() as connection:
            lock_tenant(connection, tenant)
            return _issue(connection, actor, tenant, scopes, label, expires_at)

    def revoke(self, actor: Principal, key_id: str) -> Key:
        """Accept a key no longer, from the next request on; no error if it was revoked before.

        Raises:
            ForbiddenError: the actor is no admin.
            NotFoundError: no such key.
        """
        expect_admin(actor)
        with self._catalog.write() as connection:
            found = connection.execute(
                update(keys)
                .where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
                .values(revoked_at=now())
            )
            row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
            if row is None:
                raise NotFoundError(f"there is no key {key_id[:32]!r}")
            if found.rowcount:
                note(connection, actor, row.tenant, "key.revoke", key_id)
            return _key(row)

    def list_keys(self, actor: Principal, tenant: str | None = None) -> list[Key]:
        """All keys, or a tenant's, in the order they were made.

        Raises:
            ForbiddenError: the actor is no admin.
        """
        expect_admin(actor)
        query = select(keys).order_by(keys.c.created_at, keys.c.id)
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        with self._catalog.read() as connection:
            return [_key(row) for row in connection.execute(query)]


def _issue(
    connection: Connection,
    actor: Principal,
    tenant: str,
    scopes: Collection[Scope],
    label: str,
    expires_at: datetime | None,
) -> IssuedKey:
    key_id = secrets.token_hex(6)
    secret = f"spallm_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    row = {
        "id": key_id,
        "tenant": tenant,
        "secret_sha256": _hashed(secret),
        "scopes": sorted(scopes),
        "label": label,
        "created_at": now(),
        "expires_at": expires_at,
        "revoked_at": None,
    }
    connection.execute(insert(keys).values(row))
    note(connection, actor, tenant, "key.create", key_id, scopes=" ".join(sorted(scopes)))
    made = connection.execute(select(keys).where(keys.c.id == key_id)).one()
    return IssuedKey(key=_key(made), secret=secret)


def _key(row: object) -> Key:
    fields = {name: getattr(row, name) for name in Key.model_fields if name != "scopes"}
    return Key(**fields, scopes=_scopes(getattr(row, "scopes")))  # noqa: B009


def _scopes(stored: Collection[str]) -> frozenset[Scope]:
    return frozenset(Scope(scope) for scope in stored)


def _hashed(secret: str) -> str:
    # A secret of 256 random bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).hexdigest()
