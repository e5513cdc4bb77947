"""The adapters of all tenants, by name: look up, release, roll back, share, delete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from spallm_serve.adapters_store.authority import absent, expect_owner
from spallm_serve.adapters_store.catalog import Catalog, lock_tenant
from spallm_serve.adapters_store.failures import ConflictError, NotFoundError, StoreError
from spallm_serve.adapters_store.journal import note
from spallm_serve.adapters_store.names import check_digest, check_name, parse_reference
from spallm_serve.adapters_store.records import (
    AdapterInfo,
    Principal,
    Release,
    Resolved,
    Scope,
    Version,
)
from spallm_serve.adapters_store.releases import (
    expect_released,
    history,
    release,
    released,
    rollback_target,
)
from spallm_serve.adapters_store.schema import adapters, aliases, grants, tenants
from spallm_serve.adapters_store.visibility import find_version, visible


class Adapters:
    """Adapters by owner and name.

    Changes are an owner's, by a key with the scope ``adapters``, or an admin's; to all others an
    adapter that is not theirs is not there.

    Args:
        catalog: holds them.
        base_name: what requests call the base itself; None where none is served.
        base_digest: of the base; versions of other bases cannot be asked for.
    """

    def __init__(
        self, catalog: Catalog, base_name: str | None = None, base_digest: str | None = None
    ) -> None:
        self._catalog, self._base_name, self._base_digest = catalog, base_name, base_digest

    def resolve(self, tenant: str, model: str) -> Resolved | None:
        """What a request's ``model`` field stands for.

        Args:
            tenant: who asks.
            model: the base's name, ``support``, ``acme/support``, or either of these with ``@`` and
                the first digits (four or more) of a version's digest.

        Returns:
            None for what is not there, is not this tenant's to use, is of another base, or is
            ambiguous: they cannot be told apart.
        """
        if model == self._base_name:
            return self._resolved_base(tenant, model)
        reference = parse_reference(model)
        if reference is None:
            return None
        with self._catalog.read() as connection:
            version = find_version(connection, tenant, reference, self._base_digest)
        if version is None:
            return None
        return Resolved(
            owner=version.owner,
            name=version.name,
            digest=version.digest,
            kind=version.kind,
            engine_name=version.engine_name,
        )

    def list_visible(self, tenant: str) -> list[AdapterInfo]:
        """All that a tenant may see: its own with all versions, others' releases shared with it."""
        with self._catalog.read() as connection:
            return visible(connection, tenant)

    def get(self, tenant: str, owner: str, name: str) -> AdapterInfo:
        """One of :meth:`list_visible`.

        Raises:
            NotFoundError: it is not there, or not for this tenant to see.
            StoreError: not a name.
        """
        check_name(owner, "tenant")
        check_name(name, "adapter")
        with self._catalog.read() as connection:
            found = visible(connection, tenant, owner, name)
        if not found:
            raise absent(owner, name)
        return found[0]

    def move(
        self, actor: Principal, owner: str, name: str, digest: str, expected: str | None
    ) -> Release:
        """Let a name stand for another version, if it still stands for what the caller believes.

        Args:
            actor: the owner or an admin.
            owner, name: the adapter.
            digest: of the version it will stand for.
            expected: the digest it stands for now; None for nothing.

        Raises:
            ConflictError: somebody else has moved it.
            NotFoundError: no such adapter or version.
            ForbiddenError: the key is not good for it.
        """
        check_digest(digest)
        with self._changing(actor, owner, name) as connection:
            expect_released(connection, owner, name, expected)
            return release(connection, actor, owner, name, digest)

    def rollback(
        self, actor: Principal, owner: str, name: str, expected: str | None = None
    ) -> Release:
        """Go back to the release before the current one; once more goes further back.

        Args:
            actor: the owner or an admin.
            owner, name: the adapter.
            expected: the digest it stands for now; None does not ask.

        Raises:
            ConflictError: it stands for another, or there is nothing to go back to.
            NotFoundError: no such adapter.
            ForbiddenError: the key is not good for it.
        """
        with self._changing(actor, owner, name) as connection:
            if expected is not None:
                expect_released(connection, owner, name, expected)
            digest, revision = rollback_target(connection, owner, name)
            return release(connection, actor, owner, name, digest, restores=revision)

    def history(self, actor: Principal, owner: str, name: str) -> list[Release]:
        """All releases of an adapter, the last first; also after it was deleted.

        Raises:
            NotFoundError: nothing of that name was ever released.
            ForbiddenError: the key is not good for it.
            StoreError: not a name.
        """
        expect_owner(actor, check_name(owner, "tenant"), check_name(name, "adapter"))
        with self._catalog.read() as connection:
            moves = history(connection, owner, name)
        if not moves:
            raise absent(owner, name)
        return [Release(**move) for move in moves]

    def delete(self, actor: Principal, owner: str, name: str) -> list[Version]:
        """Remove an adapter with all its versions, its release and its grants.

        Returns:
            The versions that are gone. Their bytes go with the next garbage collection.

        Raises:
            NotFoundError: no such adapter.
            ForbiddenError: the key is not good for it.
        """
        with self._changing(actor, owner, name) as connection:
            gone = visible(connection, owner, owner, name)
            if not gone:
                raise absent(owner, name)
            of_name = aliases.c.tenant == owner, aliases.c.name == name
            connection.execute(delete(aliases).where(*of_name))
            connection.execute(
                delete(adapters).where(adapters.c.tenant == owner, adapters.c.name == name)
            )
            versions = list(gone[0].versions)
            note(connection, actor, owner, "adapter.delete", name, versions=len(versions))
        return versions

    def delete_version(self, actor: Principal, owner: str, name: str, digest: str) -> Version:
        """Remove one version that is not released.

        Returns:
            The version that is gone. Its bytes go with the next garbage collection.

        Raises:
            ConflictError: it is released.
            NotFoundError: no such version.
            ForbiddenError: the key is not good for it.
        """
        check_digest(digest)
        with self._changing(actor, owner, name) as connection:
            there = visible(connection, owner, owner, name)
            versions = {version.digest: version for info in there for version in info.versions}
            if digest not in versions:
                raise absent(owner, name, digest)
            if released(connection, owner, name) == digest:
                raise ConflictError(
                    f"{owner}/{name} stands for {digest[:12]}: release another version first, or "
                    "delete the whole adapter"
                )
            connection.execute(
                delete(adapters).where(
                    adapters.c.tenant == owner,
                    adapters.c.name == name,
                    adapters.c.digest == digest,
                )
            )
            note(connection, actor, owner, "adapter.delete_version", f"{name}@{digest}")
        return versions[digest]

    def share(self, actor: Principal, owner: str, name: str, grantee: str) -> None:
        """Let another tenant use an adapter's release; no error where it may already.

        An owner is not told whether there is such a tenant. An admin is.

        Raises:
            NotFoundError: the adapter has no release; for an admin also: no such tenant.
            ForbiddenError: the key is not good for it.
            StoreError: it is the owner itself, or no name.
        """
        check_name(grantee, "tenant")
        if grantee == owner:
            raise StoreError(f"{owner} owns {owner}/{name} and needs no grant")
        with self._changing(actor, owner, name) as connection:
            if actor.may(Scope.ADMIN) and not _is_tenant(connection, grantee):
                raise NotFoundError(f"there is no tenant {grantee}")
            _expect_alias(connection, owner, name)
            row = {"tenant": owner, "name": name, "grantee": grantee}
            try:
                with connection.begin_nested():
                    connection.execute(insert(grants).values(row))
            except IntegrityError:
                return
            note(connection, actor, owner, "adapter.share", name, grantee=grantee)

    def unshare(self, actor: Principal, owner: str, name: str, grantee: str) -> None:
        """Take back :meth:`share`; no error where there was none.

        Raises:
            NotFoundError: the adapter has no release.
            ForbiddenError: the key is not good for it.
            StoreError: not a name.
        """
        check_name(grantee, "tenant")
        with self._changing(actor, owner, name) as connection:
            _expect_alias(connection, owner, name)
            found = connection.execute(
                delete(grants).where(
                    grants.c.tenant == owner, grants.c.name == name, grants.c.grantee == grantee
                )
            )
            if found.rowcount:
                note(connection, actor, owner, "adapter.unshare", name, grantee=grantee)

    def publish(self, actor: Principal, owner: str, name: str, *, public: bool = True) -> None:
        """Let every tenant use an adapter's release; or undo that.

        Raises:
            NotFoundError: the adapter has no release.
            ForbiddenError: the key is not good for it.
        """
        with self._changing(actor, owner, name) as connection:
            _expect_alias(connection, owner, name)
            connection.execute(
                update(aliases)
                .where(aliases.c.tenant == owner, aliases.c.name == name)
                .values(public=public)
            )
            note(connection, actor, owner, "adapter.publish", name, public=public)

    @contextmanager
    def _changing(self, actor: Principal, owner: str, name: str) -> Iterator[Connection]:
        """A transaction that changes an adapter of an owner, alone at that."""
        expect_owner(actor, check_name(owner, "tenant"), check_name(name, "adapter"))
        with self._catalog.write() as connection:
            lock_tenant(connection, owner)
            yield connection

    def _resolved_base(self, tenant: str, name: str) -> Resolved | None:
        query = select(tenants.c.may_use_base).where(tenants.c.name == tenant)
        with self._catalog.read() as connection:
            granted = connection.execute(query).scalar_one_or_none()
        if not granted:
            return None
        return Resolved(owner=None, name=name, digest=None, kind=None, engine_name=name)


def _is_tenant(connection: Connection, name: str) -> bool:
    query = select(tenants.c.name).where(tenants.c.name == name)
    return connection.execute(query).one_or_none() is not None


def _expect_alias(connection: Connection, owner: str, name: str) -> None:
    if released(connection, owner, name) is None:
        raise absent(owner, name)
