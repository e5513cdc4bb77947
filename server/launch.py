"""Starts vLLM's own OpenAI server with our plugin, routes and gate."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.base import open_base
from spallm_serve.adapters_store.failures import ConflictError
from spallm_serve.adapters_store.location import Location, locate
from spallm_serve.adapters_store.records import Principal, Scope
from spallm_serve.adapters_store.sandbox import Sandbox
from spallm_serve.adapters_store.store import AdapterStore, ServedBase
from spallm_serve.adapters_store.survey_base import base_manifest
from spallm_serve.adapters_store.validate import UploadLimits
from spallm_serve.errors import UserError
from spallm_serve.server import runtime
from spallm_serve.server.access_log import write_access_log
from spallm_serve.server.directory import StoreDirectory, UsageBook
from spallm_serve.server.engine_flags import found_flag
from spallm_serve.server.intake import Intake
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metrics import TenantLabels, TenantMetrics
from spallm_serve.server.salt import SECRET_BYTES
from spallm_serve.server.scratch import scratch_folder
from spallm_serve.server.settings import ServerSettings
from spallm_serve.server.tier_metrics import TierMetrics

_SECRET_FILE = "cache-secret"
# Whoever comes without a key, where nobody needs one.
_ANYBODY = Principal(tenant="everybody", scopes=frozenset({Scope.ADMIN}), key_id="none")


def serve(settings: ServerSettings, engine_flags: list[str]) -> None:
    """Serve until a signal ends it.

    Args:
        settings: ours.
        engine_flags: vLLM's own, passed on as they are.

    Raises:
        UserError: the base, the store or a setting cannot be used.
    """
    _check_environment(engine_flags)
    console = Console(stderr=True, highlight=False)
    given_secret = settings.secret_bytes()
    location = locate(settings.store, settings.database)
    own = location.folders.parent
    own.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        store = opened.enter_context(_store(settings, location))
        anonymous = _welcome(store, settings, console)
        usage = UsageBook(store)
        opened.callback(usage.flush)
        uploads = opened.enter_context(scratch_folder(own / "uploads"))
        runtime.start(
            runtime.Runtime(
                settings=settings,
                secret=given_secret or _kept_secret(own / _SECRET_FILE),
                store=store,
                directory=StoreDirectory(store, usage),
                usage=usage,
                limiter=TenantLimiter(settings.rate_storage),
                metrics=TenantMetrics(TenantLabels(settings.metrics_tenants)),
                tiers=TierMetrics(),
                uploads=uploads,
                intake=Intake(settings.uploads),
                anonymous=anonymous,
            )
        )
        if settings.access_log:
            write_access_log()
        # Only now: it reads the environment when it is imported.
        from spallm_serve.server.engine_server import run

        run(settings, engine_flags)


def _check_environment(engine_flags: list[str]) -> None:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UserError(
            "VLLM_USE_RUST_FRONTEND is set: that front end runs no middleware, so there would be "
            "no authentication; unset it"
        )
    for own, reason in _OWN_FLAGS.items():
        given = found_flag(engine_flags, own)
        if given is not None:
            raise UserError(f"{given}: {reason}")


# Flags of vLLM's that would undo what this server is for.
_OWN_FLAGS = {
    "--middleware": "the gate is the middleware here",
    "--api-server-count": "one process answers HTTP here; start more replicas instead",
    "--api-key": "keys are those of spallm-admin",
    "--lora-modules": "adapters are uploaded: PUT /v1/adapters/NAME",
    "--worker-extension-cls": "the workers' extension brings adapters here",
    "--chat-template": "the base's own template is used; put another one into its directory",
    "--enable-prompt-embeds": "embeddings that tenants send would be deserialised in the engine",
    "--trust-remote-code": "no code from a model directory is run",
    "-dp": "one engine is asked where adapters are; start more replicas instead",
    "--data-parallel-size": "one engine is asked where adapters are; start more replicas instead",
}


def _store(settings: ServerSettings, location: Location) -> AdapterStore:
    base = open_base(settings.base, location.folders.parent / "base")
    if base.sketch is None:
        raise UserError(
            f"{settings.base}: is not compressed; make it so with spallm-compress {settings.base}"
        )
    manifest = runtime.servable(base_manifest(base))
    sandbox = Sandbox(manifest, UploadLimits(tensor_bytes=settings.upload_bytes))
    sandbox.warm_up()
    return AdapterStore(location, ServedBase(settings.name, sandbox))


def _welcome(store: AdapterStore, settings: ServerSettings, console: Console) -> Principal | None:
    if settings.insecure_no_auth:
        console.print(
            f"[bold white on red] NO AUTHENTICATION [/] whoever reaches "
            f"{settings.host}:{settings.port} may do everything"
        )
        with suppress(ConflictError):  # from the second start on it is there
            store.tenants.create(OPERATOR, _ANYBODY.tenant, may_use_base=True)
        return _ANYBODY
    issued = store.keys.bootstrap()
    if issued is not None:
        console.print(
            "[bold]the first admin key[/], shown this once:\n\n"
            f"    {escape(issued.secret)}\n\n"
            "tenants and their keys: spallm-admin tenant create, spallm-admin key create"
        )
    return None


def _kept_secret(path: Path) -> bytes:
    """The server's own secret, made at the first start."""
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        # Nobody else's from the first byte on.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES))
        partial.replace(path)
    return bytes.fromhex(path.read_text())
