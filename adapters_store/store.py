"""The adapter store: everything a server of many tenants keeps.

All methods block; a server calls them in threads. Several processes, also on several machines, may
use one store.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy import select

from spallm_serve.adapters_store.adapters import Adapters
from spallm_serve.adapters_store.authority import absent, expect_admin, expect_owner
from spallm_serve.adapters_store.blobs import BlobStore
from spallm_serve.adapters_store.catalog import Catalog, lock_tenant
from spallm_serve.adapters_store.collection import collect_blobs, pointing_at
from spallm_serve.adapters_store.failures import (
    ForbiddenError,
    QuotaError,
    StoreError,
    UnavailableError,
)
from spallm_serve.adapters_store.folders import Folders
from spallm_serve.adapters_store.journal import Journal, note
from spallm_serve.adapters_store.keys import Keys
from spallm_serve.adapters_store.location import Location
from spallm_serve.adapters_store.names import check_digest, check_name
from spallm_serve.adapters_store.records import (
    Collected,
    Principal,
    PutResult,
    Quota,
    Scope,
)
from spallm_serve.adapters_store.sandbox import Sandbox
from spallm_serve.adapters_store.schema import adapters
from spallm_serve.adapters_store.tenants import DEFAULT_QUOTA, Tenants, check_room
from spallm_serve.adapters_store.usage import Usage
from spallm_serve.adapters_store.validate import Checked
from spallm_serve.adapters_store.versions import Putting, add_version, finish

# An upload's blobs are there before its version is; it has this long to come.
GRACE_SECONDS = 3600.0
# A garbage collection can take the blobs of an upload away this often in a row.
_ATTEMPTS = 5


@dataclass(frozen=True)
class ServedBase:
    """The base that a server answers with.

    Attributes:
        name: what requests call it.
        sandbox: checks uploads for it; closed with the store.
    """

    name: str
    sandbox: Sandbox


class AdapterStore:
    """Tenants, keys, adapters, usage and the audit log.

    Args:
        location: where all is kept; what is not there is made.
        base: what adapters are put for; None where none are put or asked for, only administered.
        default_quota: of tenants without one of their own.

    Attributes:
        tenants: make, suspend, quotas, who may use the base.
        keys: authenticate, make, revoke.
        adapters: resolve, list, release, roll back, share, delete.
        usage: count and report.
        audit: who did what.

    Raises:
        StoreError: a part of it cannot be opened.
    """

    def __init__(
        self,
        location: Location,
        base: ServedBase | None = None,
        *,
        default_quota: Quota = DEFAULT_QUOTA,
    ) -> None:
        self._base, self._default_quota = base, default_quota
        self._blobs = BlobStore(location.blobs)
        self._folders = Folders(location.folders, self._blobs)
        _make_room_for(location.database)
        self._catalog = Catalog(location.database)
        self.tenants = Tenants(self._catalog, default_quota)
        self.keys = Keys(self._catalog)
        self.adapters = (
            Adapters(self._catalog)
            if base is None
            else Adapters(self._catalog, base.name, base.sandbox.manifest.base_digest)
        )
        self.usage = Usage(self._catalog)
        self.audit = Journal(self._catalog)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections and processes."""
        self._catalog.close()
        if self._base is not None:
            self._base.sandbox.close()

    def validate(self, actor: Principal, config: Path, tensors: Path) -> Checked:
        """Check an upload and keep nothing of it.

        Args:
            actor: may put adapters.
            config, tensors: the two files.

        Raises:
            RejectedError: what is wrong with it.
            ForbiddenError: the key is not good for it.
        """
        if not actor.may(Scope.ADAPTERS):
            raise ForbiddenError("this needs a key with the scope 'adapters'")
        return self._served().sandbox.check(config, tensors)

    def put(
        self,
        actor: Principal,
        owner: str,
        name: str,
        config: Path,
        tensors: Path,
        *,
        release_it: bool = True,
        frozen: bool = False,
    ) -> PutResult:
        """Store an adapter's version; the same one again changes nothing.

        Args:
            actor: the owner or an admin.
            owner, name: what it will be asked for by.
            config, tensors: the two files; nobody may change them meanwhile.
            release_it: whether the name stands for it from now on, whatever it stood for.
            frozen: whether nobody will change ``tensors`` any more: then it need not be copied.

        Raises:
            RejectedError: it is no adapter of the base.
            QuotaError: the owner has no room for it.
            NotFoundError: no such owner.
            ForbiddenError: the key is not good for it.
            StoreError: not a name, or the base's.
            UnavailableError: storing failed.
        """
        expect_owner(actor, check_name(owner, "tenant"), check_name(name, "adapter"))
        base = self._served()
        if name == base.name:
            raise StoreError(f"{name} is what the base is called here; choose another name")
        self._check_size(owner, tensors)
        put = Putting(actor, owner, name, base.sandbox.check(config, tensors), release_it)
        with self._catalog.write() as connection:
            lock_tenant(connection, owner)
            done = finish(connection, put, created=False)
            if done is None:  # before any byte is stored
                nbytes = len(put.checked.config.encode()) + tensors.stat().st_size
                check_room(connection, owner, nbytes, self._default_quota)
        for _ in range(_ATTEMPTS):
            done = done or self._store_version(put, tensors, frozen)
            if done is not None:
                return done
        raise UnavailableError(
            "the store's garbage collection keeps removing what is put; try again"
        )

    def local_folder(self, digest: str) -> Path:
        """A local, read-only directory of a version, complete, in the format of adapters.

        The same for whichever tenants have it: what a digest does not cover is not in it.

        Raises:
            NotFoundError: no tenant has such a version.
            UnavailableError: its bytes are damaged or cannot be read.
        """
        query = select(adapters.c.config_blob, adapters.c.tensors_blob)
        with self._catalog.read() as connection:
            one = query.where(adapters.c.digest == check_digest(digest)).limit(1)
            row = connection.execute(one).one_or_none()
        if row is None:
            raise absent("any", "adapter", digest)
        return self._folders.folder(digest, row.config_blob, row.tensors_blob)

    def collect(self, actor: Principal, grace: float = GRACE_SECONDS) -> Collected:
        """Remove bytes that no version needs, in the store and in this machine's local folders.

        Safe beside everything else, at any time.

        Args:
            actor: an admin.
            grace: seconds for which what is new is left alone.

        Raises:
            ForbiddenError: the actor is no admin.
            UnavailableError: something cannot be removed.
        """
        expect_admin(actor)
        removed = collect_blobs(self._catalog, self._blobs, grace)
        with self._catalog.read() as connection:
            kept = set(connection.execute(select(adapters.c.digest).distinct()).scalars())
        found = Collected(
            blobs=len(removed),
            nbytes=sum(blob.nbytes for blob in removed),
            partials=self._blobs.sweep(grace),
            folders=self._folders.sweep(kept, grace),
        )
        with self._catalog.write() as connection:
            note(connection, actor, actor.tenant, "store.collect", "", **found.model_dump())
        return found

    def _served(self) -> ServedBase:
        if self._base is None:
            raise StoreError("no base is served here, so no adapter can be checked against it")
        return self._base

    def _check_size(self, owner: str, tensors: Path) -> None:
        """Refuse what the owner could not keep even if it had nothing else."""
        most, nbytes = self.tenants.quota(owner).max_bytes, tensors.stat().st_size
        if most is not None and nbytes > most:
            raise QuotaError(f"{nbytes:,} bytes of tensors; {owner} may store {most:,} in all")

    def _store_version(self, put: Putting, tensors: Path, frozen: bool) -> PutResult | None:
        """Store an upload's blobs, then its row; None where the blobs were removed in between."""
        with tempfile.TemporaryDirectory() as scratch:
            canonical = Path(scratch) / "config"
            canonical.write_text(put.checked.config)
            blobs = (
                self._blobs.put_file(canonical),
                self._blobs.put_file(tensors, frozen=frozen),
            )
        with self._catalog.write() as connection:
            if not pointing_at(connection, self._blobs, [blob.digest for blob in blobs]):
                return None
            lock_tenant(connection, put.owner)
            done = finish(connection, put, created=False)  # another may have put the same
            if done is not None:
                return done
            nbytes = sum(blob.nbytes for blob in blobs)
            check_room(connection, put.owner, nbytes, self._default_quota)
            add_version(connection, put, *blobs)
            return finish(connection, put, created=True)


def _make_room_for(database: str) -> None:
    """Make the folder of a SQLite file."""
    prefix = "sqlite:///"
    if not database.startswith(prefix):
        return
    folder = Path(database.removeprefix(prefix)).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"{folder}: cannot hold the catalogue ({error})") from error
