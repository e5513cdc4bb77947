"""What the gate asks about tenants, keys and adapters; and the store that answers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol

from spallm_serve.adapters_store.records import Principal, Quota, Resolved, UsageRow
from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.server.metering import Usage


class Directory(Protocol):
    """Tenants, keys and adapters, as the gate asks for them; all but :meth:`record` may block."""

    def authenticate(self, bearer: str) -> Principal | None:
        """Whose key this is; None if it is nobody's, revoked or expired."""

    def resolve(self, tenant: str, model: str) -> Resolved | None:
        """What a tenant means by a model; None if there is none that it may use."""

    def quota(self, tenant: str) -> Quota:
        """What the tenant may take."""

    def record(self, tenant: str, resolved: Resolved, usage: Usage) -> None:
        """Remember what a request took."""


class UsageBook:
    """Usage that is not in the store yet: a transaction a request would wait for the disk.

    Args:
        store: where it goes.
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str, object], UsageRow] = {}

    def add(self, tenant: str, adapter: str, usage: Usage) -> None:
        """One request."""
        day = datetime.now(UTC).date()
        new = UsageRow(
            tenant=tenant,
            adapter=adapter,
            day=day,
            requests=1,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
        )
        with self._lock:
            self._put(new)

    def flush(self) -> None:
        """Write all of it into the store; what cannot be written now stays for the next time."""
        with self._lock:
            rows, self._rows = self._rows, {}
        try:
            self._store.usage.record(rows.values())
        except BaseException:
            self._put_back(rows.values())
            raise

    def _put_back(self, rows: Iterable[UsageRow]) -> None:
        with self._lock:
            for row in rows:
                self._put(row)

    def _put(self, row: UsageRow) -> None:
        key = row.tenant, row.adapter, row.day
        known = self._rows.get(key)
        if known is not None:
            names = ("requests", "prompt_tokens", "completion_tokens")
            sums = {name: getattr(known, name) + getattr(row, name) for name in names}
            row = row.model_copy(update=sums)
        self._rows[key] = row


class StoreDirectory:
    """The adapter store as the gate sees it.

    Args:
        store: of tenants and adapters.
        usage: counted until it is flushed.
    """

    def __init__(self, store: AdapterStore, usage: UsageBook) -> None:
        self._store, self._usage = store, usage
        self.authenticate = store.keys.authenticate
        self.resolve = store.adapters.resolve
        self.quota = store.tenants.quota

    def record(self, tenant: str, resolved: Resolved, usage: Usage) -> None:
        """See :class:`UsageBook`."""
        adapter = resolved.name if resolved.is_base else f"{resolved.owner}/{resolved.name}"
        self._usage.add(tenant, adapter, usage)
