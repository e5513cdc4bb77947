"""What the store gives to those who use it."""

from __future__ import annotations

from datetime import date, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from spallm_serve.adapters_store.names import engine_name


class Record(BaseModel):
    """What all have in common: no unknown fields, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scope(StrEnum):
    """What a key is good for.

    ``inference``: to ask models. ``adapters``: to put, release, share and delete its tenant's
    adapters. ``admin``: everything, for every tenant.
    """

    INFERENCE = "inference"
    ADAPTERS = "adapters"
    ADMIN = "admin"


class Principal(Record):
    """Who asks: a tenant, by one of its keys.

    Attributes:
        tenant: its name.
        scopes: of the key.
        key_id: the key's, for logs; it is no secret.
    """

    tenant: str
    scopes: frozenset[Scope]
    key_id: str

    def may(self, scope: Scope) -> bool:
        """Whether the key is good for it."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


class Tenant(Record):
    """A tenant.

    Attributes:
        suspended: none of its keys is accepted, and nobody can use what it shared.
        may_use_base: whether it may ask the base itself, without an adapter.
    """

    name: str
    created_at: datetime
    suspended: bool
    may_use_base: bool


class Quota(Record):
    """What a tenant may use at most; None is no limit.

    Attributes:
        max_bytes: of all its versions, as uploaded.
        max_adapters: versions that it keeps.
        requests_per_minute, tokens_per_minute, concurrent_requests: for the server to hold it to.
    """

    max_bytes: int | None = Field(default=None, ge=0)
    max_adapters: int | None = Field(default=None, ge=0)
    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    concurrent_requests: int | None = Field(default=None, ge=0)


class Key(Record):
    """A key, without its secret."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    label: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class IssuedKey(Record):
    """A new key; the only time that its secret is known.

    Attributes:
        secret: what clients send as their bearer token.
    """

    key: Key
    secret: str = Field(repr=False)


class Version(Record):
    """One version of an adapter.

    Attributes:
        digest: its identity.
        kind: ``SPALLM_LUT``, ``SPALLM_SMT`` or ``LORA``.
        base_digest: of the base it was checked against.
        nbytes: of configuration and tensors.
    """

    owner: str
    name: str
    digest: str
    kind: str
    base_digest: str
    nbytes: int
    created_at: datetime

    @property
    def engine_name(self) -> str:
        """``owner/name@digest``."""
        return engine_name(self.owner, self.name, self.digest)


class AdapterInfo(Record):
    """An adapter, as far as the tenant who asks may see it.

    Attributes:
        released: what its name stands for now; None while nothing is released.
        revision: number of the last release; it grows with every move.
        versions: all of them, newest first; of others' adapters only the released one.
        public: whether every tenant may use it.
        shared_with: tenants who may; of others' adapters nothing is told.
    """

    owner: str
    name: str
    released: Version | None
    revision: int | None
    versions: tuple[Version, ...]
    public: bool
    shared_with: tuple[str, ...]


class Release(Record):
    """A move of an adapter's name to a version.

    Attributes:
        revision: 1, 2, 3, ...
        restores: for a rollback, the revision that it went back to.
        key_id: of who moved it.
    """

    revision: int
    digest: str
    restores: int | None
    key_id: str
    moved_at: datetime


class PutResult(Record):
    """What a put did.

    Attributes:
        created: False where that version was there already.
        released: whether the name stands for it now.
    """

    version: Version
    created: bool
    released: bool


class Resolved(Record):
    """What a request's ``model`` field stands for.

    Attributes:
        owner, digest, kind: None for the base itself.
        name: the adapter's, or the base's.
        engine_name: ``owner/name@digest``, or the base's name.
    """

    owner: str | None
    name: str
    digest: str | None
    kind: str | None
    engine_name: str

    @property
    def is_base(self) -> bool:
        """Whether no adapter is meant."""
        return self.digest is None


class AuditEntry(Record):
    """Something that somebody did.

    Attributes:
        actor, key_id: who.
        tenant: whose things it was done to.
        action: what, as ``adapter.put``.
        subject: to what, as ``support@<digest>``.
    """

    id: int
    at: datetime
    actor: str
    key_id: str
    tenant: str
    action: str
    subject: str
    details: dict[str, Any]


class UsageRow(Record):
    """What a tenant used of one adapter on one day.

    Attributes:
        adapter: ``owner/name``, or the base's name.
        day: in UTC.
    """

    tenant: str
    adapter: str = Field(max_length=130)
    day: date
    requests: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Collected(Record):
    """What a garbage collection removed.

    Attributes:
        blobs, nbytes: that nothing pointed at.
        partials: files that killed processes had left.
        folders: local copies of versions that are gone.
    """

    blobs: int
    nbytes: int
    partials: int
    folders: int
