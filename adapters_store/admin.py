"""What ``spallm-admin`` does once its options are understood."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.journal import LARGEST_PAGE
from spallm_serve.adapters_store.location import locate
from spallm_serve.adapters_store.names import parse_reference
from spallm_serve.adapters_store.records import AuditEntry, Quota, Scope
from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.errors import UserError


class Admin:
    """A store, administered from the terminal of its machine.

    Args:
        store: a folder or a bucket's URL; None for the usual folder.
        database: SQLAlchemy's URL; None for the store's own.

    Raises:
        UserError: it cannot be opened. So do all methods where the store refuses.
    """

    def __init__(self, store: str | None, database: str | None) -> None:
        self._store = AdapterStore(locate(store, database))
        self._console = Console(highlight=False)

    def create_tenant(self, name: str, *, base: bool) -> None:
        """Make a tenant."""
        self._store.tenants.create(OPERATOR, name, may_use_base=base)
        self._say(f"tenant {name} is there; next: spallm-admin key create {name}")

    def list_tenants(self, *, as_json: bool) -> None:
        """Print all tenants."""
        self._show(self._store.tenants.list_tenants(OPERATOR), as_json=as_json)

    def suspend(self, name: str, *, undo: bool) -> None:
        """Suspend a tenant, or undo that."""
        self._store.tenants.suspend(OPERATOR, name, suspended=not undo)
        self._say(f"tenant {name} is {'back' if undo else 'suspended'}")

    def create_key(
        self, tenant: str, scopes: Sequence[str], label: str, days: float | None
    ) -> None:
        """Make a key and print its secret, alone on standard output."""
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        issued = self._store.keys.create(
            OPERATOR, tenant, [Scope(scope) for scope in scopes], label=label, expires_at=expires
        )
        note = Console(stderr=True, highlight=False)
        note.print(f"key {issued.key.id} of {tenant}; its secret will not be shown again:")
        print(issued.secret)

    def list_keys(self, tenant: str | None, *, as_json: bool) -> None:
        """Print keys."""
        self._show(self._store.keys.list_keys(OPERATOR, tenant), as_json=as_json)

    def revoke_key(self, key_id: str) -> None:
        """Revoke a key."""
        key = self._store.keys.revoke(OPERATOR, key_id)
        self._say(f"key {key.id} of {key.tenant} is revoked")

    def grant_base(self, tenant: str, *, undo: bool) -> None:
        """Grant the base, or undo that."""
        self._store.tenants.grant_base(OPERATOR, tenant, granted=not undo)
        self._say(f"tenant {tenant} may {'not ' if undo else ''}ask the base")

    def share(self, adapter: str, tenant: str, *, undo: bool) -> None:
        """Share an adapter, or undo that."""
        owner, name = _owner_and_name(adapter)
        change = self._store.adapters.unshare if undo else self._store.adapters.share
        change(OPERATOR, owner, name, tenant)
        self._say(f"tenant {tenant} may {'not ' if undo else ''}use {adapter}")

    def publish(self, adapter: str, *, undo: bool) -> None:
        """Make an adapter public, or undo that."""
        owner, name = _owner_and_name(adapter)
        self._store.adapters.publish(OPERATOR, owner, name, public=not undo)
        self._say(f"{adapter} is {'not ' if undo else ''}public")

    def list_visible(self, tenant: str, *, as_json: bool) -> None:
        """Print what a tenant may use."""
        self._store.tenants.get(tenant)
        infos = self._store.adapters.list_visible(tenant)
        if as_json:
            print(json.dumps([info.model_dump(mode="json") for info in infos], indent=2))
            return
        table = _table("adapter", "released", "versions", "bytes", "public", "shared with")
        for info in infos:
            table.add_row(
                f"{info.owner}/{info.name}",
                "" if info.released is None else info.released.digest[:12],
                str(len(info.versions)),
                f"{sum(version.nbytes for version in info.versions):,}",
                _cell(info.public),
                ", ".join(info.shared_with),
            )
        self._console.print(table)

    def show_quota(self, tenant: str, *, as_json: bool) -> None:
        """Print a tenant's quota."""
        self._store.tenants.get(tenant)
        self._show([self._store.tenants.quota(tenant)], as_json=as_json)

    def set_quota(
        self,
        tenant: str,
        limits: Mapping[str, int | None],
        unlimited: Sequence[str],
        *,
        default: bool,
    ) -> None:
        """Change what is given of a tenant's quota."""
        unknown = sorted(set(unlimited) - set(Quota.model_fields))
        if unknown:
            raise UserError(f"--unlimited {unknown[0]}: expected {', '.join(Quota.model_fields)}")
        changes: dict[str, int | None] = {
            name: value for name, value in limits.items() if value is not None
        }
        changes |= dict.fromkeys(unlimited)
        if default:
            self._store.tenants.set_quota(OPERATOR, tenant, None)
        if changes:
            old = self._store.tenants.quota(tenant)
            self._store.tenants.set_quota(OPERATOR, tenant, old.model_copy(update=changes))
        self.show_quota(tenant, as_json=False)

    def show_audit(
        self, tenant: str | None, action: str | None, since: datetime | None, *, as_json: bool
    ) -> None:
        """Print the audit log."""
        moment = None if since is None else since.replace(tzinfo=UTC)
        entries = list(self._entries(tenant, action, moment))
        self._show(entries, as_json=as_json)

    def collect(self, grace: float) -> None:
        """Remove garbage, and say how much."""
        found = self._store.collect(OPERATOR, grace)
        self._say(
            f"removed {found.blobs} blobs ({found.nbytes:,} bytes), {found.partials} unfinished "
            f"files, {found.folders} local copies"
        )

    def _entries(
        self, tenant: str | None, action: str | None, since: datetime | None
    ) -> Iterator[AuditEntry]:
        after = 0
        while True:
            page = self._store.audit.entries(
                OPERATOR,
                tenant=tenant,
                action=action,
                since=since,
                after=after,
                limit=LARGEST_PAGE,
            )
            yield from page
            if len(page) < LARGEST_PAGE:
                return
            after = page[-1].id

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _show(self, records: Sequence[BaseModel], *, as_json: bool) -> None:
        if as_json:
            print(json.dumps([record.model_dump(mode="json") for record in records], indent=2))
            return
        if not records:
            self._say("none")
            return
        table = _table(*type(records[0]).model_fields)
        for record in records:
            table.add_row(*(_cell(value) for _, value in record))
        self._console.print(table)


def _owner_and_name(adapter: str) -> tuple[str, str]:
    reference = parse_reference(adapter)
    if reference is None or reference.owner is None or reference.digest_start is not None:
        raise UserError(f"{adapter[:140]!r}: expected OWNER/NAME")
    return reference.owner, reference.name


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, frozenset):
        return ", ".join(sorted(map(str, value)))
    return escape(str(value))
