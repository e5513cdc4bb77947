"""What a server's parts share, in the one process that answers HTTP.

vLLM makes the middleware and calls the plugins itself, without a word of ours; so they find here
what they need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.records import Principal
from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.server.directory import StoreDirectory, UsageBook
from spallm_serve.server.intake import Intake
from spallm_serve.server.limits import TenantLimiter
from spallm_serve.server.metrics import TenantMetrics
from spallm_serve.server.residency import Residency
from spallm_serve.server.settings import ServerSettings
from spallm_serve.server.tier_metrics import TierMetrics


@dataclass
class Runtime:
    """A running server.

    Attributes:
        settings: what it was told.
        secret: of the tenants' cache salts.
        store: tenants, keys, adapters.
        directory: the same, as the gate asks.
        usage: not yet in the store.
        limiter, metrics: of tenants.
        tiers: metrics of adapters.
        uploads: folder for what is on its way in.
        intake: how many of them there are at a time.
        anonymous: who everybody without a key is, or None.
        residency: there once the engine runs.
    """

    settings: ServerSettings
    secret: bytes
    store: AdapterStore
    directory: StoreDirectory
    usage: UsageBook
    limiter: TenantLimiter
    metrics: TenantMetrics
    tiers: TierMetrics
    uploads: Path
    intake: Intake
    anonymous: Principal | None
    residency: Residency | None = None

    def engine(self) -> Residency:
        """The way to the engine's workers.

        Raises:
            RuntimeError: it does not run yet.
        """
        if self.residency is None:
            raise RuntimeError("the engine does not run yet")
        return self.residency


def servable(manifest: BaseManifest) -> BaseManifest:
    """What of a base an adapter can change while it is served: compressed linears and RMS norms.

    Layers that were left as they are have no slots, nor have normalisations with a bias. They are
    left out, so that an upload that changes one of them is refused as one for a layer the base does
    not have.
    """
    linears = {name: shape for name, shape in manifest.linears.items() if shape.bits is not None}
    norms = {
        name: shape
        for name, shape in manifest.norms.items()
        if name.endswith(".weight") and name.removesuffix("weight") + "bias" not in manifest.norms
    }
    return manifest.model_copy(update={"linears": linears, "norms": norms})


_current: list[Runtime] = []


def start(runtime: Runtime) -> None:
    """Make a server the one of this process."""
    _current[:] = [runtime]


def current() -> Runtime:
    """The server of this process.

    Raises:
        RuntimeError: there is none.
    """
    if not _current:
        raise RuntimeError("no server was started in this process; use spallm-serve")
    return _current[0]
