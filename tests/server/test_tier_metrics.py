"""What /metrics says of where adapters are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from spallm_serve.server.tier_metrics import TierMetrics

FACTS = {
    "slots": {"/a": 1, "/b": 2},
    "pinned": ["/a"],
    "host": ["/a", "/b", "/c"],
    "host_bytes": 300,
    "slot_bytes": 70,
    "loads": {"count": 5, "nbytes": 500, "seconds": 1.5},
    "moves": {"swaps": 9, "swap_seconds": 0.25, "late_loads": 0},
}


def test_counts_are_those_of_each_worker_and_of_requests() -> None:
    registry = CollectorRegistry()
    tiers = TierMetrics(registry)
    assert b"worker=" not in generate_latest(registry)
    tiers.update([FACTS, FACTS | {"slots": {}, "pinned": []}])
    tiers.found("host")
    tiers.found("host")
    said = generate_latest(registry).decode()
    for line in (
        'spallm_adapter_bytes{tier="host",worker="0"} 300.0',
        'spallm_adapter_bytes{tier="slot",worker="0"} 140.0',
        'spallm_adapter_bytes{tier="slot",worker="1"} 0.0',
        'spallm_adapters{tier="pinned",worker="0"} 1.0',
        'spallm_adapters{tier="host",worker="0"} 3.0',
        'spallm_adapter_moves_total{into="slot",worker="0"} 9.0',
        'spallm_adapter_move_seconds_total{into="host",worker="0"} 1.5',
        'spallm_late_loads_total{worker="0"} 0.0',
        'spallm_adapter_requests_total{found="host"} 2.0',
    ):
        assert line in said
