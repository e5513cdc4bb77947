"""The command ``spallm-admin``."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Optional

import typer

from spallm_serve.adapters_store.location import DATABASE_VARIABLE, STORE_VARIABLE
from spallm_serve.console import user_errors

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Administer the adapter store: tenants, keys, grants, quotas, audit log, garbage. Works "
    "on the store itself, so whoever can read its files or its database is an admin.",
)


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=text, rich_markup_mode="rich")
    app.add_typer(group, name=name)
    return group


tenant_app = _group("tenant", "Make, list and suspend tenants.")
key_app = _group("key", "Make, list and revoke API keys.")
grant_app = _group("grant", "Who may use the base, and others' adapters.")
quota_app = _group("quota", "What tenants may use.")

_Option = typer.Option
_Store = Annotated[
    Optional[str],
    _Option(
        "--store",
        envvar=STORE_VARIABLE,
        help="A folder, or s3://, gs://, az://BUCKET/PREFIX for the adapters' bytes.",
    ),
]
_Database = Annotated[
    Optional[str],
    _Option(
        "--database",
        envvar=DATABASE_VARIABLE,
        help="postgresql://... or sqlite:///PATH; by default SQLite in the store's folder.",
    ),
]
_Json = Annotated[bool, _Option("--json", help="Print JSON instead of a table.")]
_Tenant = Annotated[str, typer.Argument(help="The tenant's name.")]
_Adapter = Annotated[str, typer.Argument(help="OWNER/NAME.")]
_Undo = Annotated[bool, _Option("--undo", help="Take it back.")]


class KeyScope(StrEnum):
    """What a key is good for."""

    INFERENCE = "inference"
    ADAPTERS = "adapters"
    ADMIN = "admin"


@tenant_app.command("create")
def tenant_create(
    tenant: _Tenant,
    base: Annotated[bool, _Option("--base", help="It may ask the base without adapter.")] = False,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Make a tenant."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).create_tenant(tenant, base=base)


@tenant_app.command("list")
def tenant_list(as_json: _Json = False, store: _Store = None, database: _Database = None) -> None:
    """List all tenants."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).list_tenants(as_json=as_json)


@tenant_app.command("suspend")
def tenant_suspend(
    tenant: _Tenant, undo: _Undo = False, store: _Store = None, database: _Database = None
) -> None:
    """Accept none of a tenant's keys, and let nobody use what it shared."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).suspend(tenant, undo=undo)


@key_app.command(
    "create", epilog="[b]Example[/b]   spallm-admin key create acme --scope adapters --days 90"
)
def key_create(
    tenant: _Tenant,
    scope: Annotated[
        Optional[list[KeyScope]],
        _Option(help="What it is good for; may be repeated. Without: inference."),
    ] = None,
    label: Annotated[str, _Option(help="Words to know it by.")] = "",
    days: Annotated[Optional[float], _Option(help="It expires after these.", min=0.001)] = None,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Make a key. Its secret is printed once, on standard output, and kept nowhere."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        chosen = [str(one) for one in scope or [KeyScope.INFERENCE]]
        Admin(store, database).create_key(tenant, chosen, label, days)


@key_app.command("list")
def key_list(
    tenant: Annotated[Optional[str], typer.Argument(help="Only this tenant's.")] = None,
    as_json: _Json = False,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """List keys, without their secrets."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).list_keys(tenant, as_json=as_json)


@key_app.command("revoke")
def key_revoke(
    key: Annotated[str, typer.Argument(help="The key's id, as listed.")],
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Accept a key no longer, from the next request on."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).revoke_key(key)


@grant_app.command("base")
def grant_base(
    tenant: _Tenant, undo: _Undo = False, store: _Store = None, database: _Database = None
) -> None:
    """Let a tenant ask the base itself."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).grant_base(tenant, undo=undo)


@grant_app.command("share")
def grant_share(
    adapter: _Adapter,
    tenant: Annotated[str, typer.Argument(help="Who may use it.")],
    undo: _Undo = False,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Let another tenant use an adapter's release."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).share(adapter, tenant, undo=undo)


@grant_app.command("public")
def grant_public(
    adapter: _Adapter, undo: _Undo = False, store: _Store = None, database: _Database = None
) -> None:
    """Let every tenant use an adapter's release."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).publish(adapter, undo=undo)


@grant_app.command("list")
def grant_list(
    tenant: _Tenant, as_json: _Json = False, store: _Store = None, database: _Database = None
) -> None:
    """List what a tenant may use: its own adapters, and what is shared with it."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).list_visible(tenant, as_json=as_json)


@quota_app.command("show")
def quota_show(
    tenant: _Tenant, as_json: _Json = False, store: _Store = None, database: _Database = None
) -> None:
    """Say what a tenant may use."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).show_quota(tenant, as_json=as_json)


@quota_app.command(
    "set",
    epilog="[b]Example[/b]   spallm-admin quota set acme --max-adapters 20",
)
def quota_set(
    tenant: _Tenant,
    max_bytes: Annotated[Optional[int], _Option(help="Stored.", min=0)] = None,
    max_adapters: Annotated[Optional[int], _Option(help="Versions kept.", min=0)] = None,
    requests_per_minute: Annotated[Optional[int], _Option(min=0)] = None,
    tokens_per_minute: Annotated[Optional[int], _Option(min=0)] = None,
    concurrent_requests: Annotated[Optional[int], _Option(min=0)] = None,
    unlimited: Annotated[
        Optional[list[str]], _Option(metavar="NAME", help="No limit on this; may be repeated.")
    ] = None,
    default: Annotated[bool, _Option("--default", help="Go back to the default first.")] = False,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Change a tenant's quota; what is not named stays."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        limits = {
            "max_bytes": max_bytes,
            "max_adapters": max_adapters,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrent_requests": concurrent_requests,
        }
        Admin(store, database).set_quota(tenant, limits, unlimited or [], default=default)


@app.command()
def audit(
    tenant: Annotated[Optional[str], _Option(help="Only what was done to this one's.")] = None,
    action: Annotated[Optional[str], _Option(help="Only this, as adapter.put.")] = None,
    since: Annotated[Optional[datetime], _Option(help="Only from then on, in UTC.")] = None,
    as_json: _Json = False,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Print the audit log, the oldest entry first."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).show_audit(tenant, action, since, as_json=as_json)


@app.command()
def gc(
    grace: Annotated[
        float, _Option(help="Seconds for which what is new is left alone.", min=0)
    ] = 3600,
    store: _Store = None,
    database: _Database = None,
) -> None:
    """Remove bytes that no adapter needs. Safe while servers run."""
    with user_errors():
        from spallm_serve.adapters_store.admin import Admin

        Admin(store, database).collect(grace)
