"""Our own server under measurement, with tenants that each have a key and an adapter."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.location import locate
from spallm_serve.adapters_store.records import Quota, Scope
from spallm_serve.adapters_store.store import AdapterStore
from spallm_serve.benchmarks.serve_client import Target
from spallm_serve.benchmarks.serve_process import ServerProcess, server_process

_ADAPTER = "tuned"
# More than all adapters of a run: what leaves memory is measured by starting anew.
_HOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Tenants:
    """Who may ask a server of ours.

    Attributes:
        base: for the base itself.
        adapters: one for each tenant.
        mover: another tenant, who uploads and asks meanwhile.
        admin: key of an operator.
    """

    base: Target
    adapters: list[Target]
    mover: Target
    admin: str


def make_tenants(store: Path, count: int) -> Tenants:
    """Tenants in a new store, as an operator makes them; the adapters are not there yet."""
    store.mkdir(parents=True)
    with AdapterStore(locate(str(store))) as opened:

        def key(tenant: str) -> str:
            opened.tenants.create(OPERATOR, tenant, may_use_base=True)
            # No limits, as the peers have none.
            opened.tenants.set_quota(OPERATOR, tenant, Quota())
            return opened.keys.create(OPERATOR, tenant, [Scope.INFERENCE, Scope.ADAPTERS]).secret

        keys = [key(f"tenant-{number}") for number in range(count)]
        mover = Target(_ADAPTER, key("mover"))
        admin = opened.keys.create(OPERATOR, "mover", [Scope.ADMIN]).secret
    return Tenants(Target("base", keys[0]), [Target(_ADAPTER, each) for each in keys], mover, admin)


@contextlib.contextmanager
def our_server(
    base: Path, store: Path, slots: int, engine_flags: Sequence[object]
) -> Iterator[ServerProcess]:
    """``spallm-serve`` on a store.

    Args:
        base: what spallm-compress made.
        store: folder; kept when the server ends.
        slots: beside the base's.
        engine_flags: for vLLM.
    """
    command = [
        Path(sys.executable).with_name("spallm-serve"), base, "--store", store, "--slots", slots,
        "--host-bytes", _HOST_BYTES, "--", *engine_flags,
    ]  # fmt: skip
    with server_process(command, store.with_suffix(".log"), "/readyz", {}) as process:
        yield process


def residency(url: str, admin: str) -> dict[str, Any]:
    """What is in the first worker's slots and memory."""
    headers = {"Authorization": f"Bearer {admin}"}
    answer = httpx.get(f"{url}/v1/residency", headers=headers, timeout=60)
    answer.raise_for_status()
    facts: dict[str, Any] = answer.json()["workers"][0]
    return facts
