"""The picture of a load over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spallm_serve.benchmarks.records import BenchmarkResults, Record

_COLOURS = ("#2a6f97", "#e07a1f", "#5a9a4a", "#8d5a97")
_STYLES = {"uniform": "-", "zipf": "--"}
_METRIC = "share_of_base_only"
# A server's cells: (tenants, share), by how tenants are chosen.
_Lines = dict[tuple[str, str], list[tuple[int, float]]]


def plot_serve(found: BenchmarkResults, path: Path) -> None:
    """Throughput with many tenants as a share of the server's own base, a panel a concurrency."""
    from matplotlib.figure import Figure

    records = [record for record in found.records if record.metric == _METRIC]
    levels = sorted({int(record.case["concurrency"] or 0) for record in records})
    servers = list(dict.fromkeys(str(record.case["server"]) for record in records))
    figure = Figure(figsize=(1 + 3.6 * max(1, len(levels)), 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(levels)), squeeze=False, sharey=True)[0]
    for panel, level in zip(panels, levels, strict=False):
        here = [record for record in records if record.case["concurrency"] == level]
        for (server, choice), points in _lines(here).items():
            panel.plot(
                *zip(*sorted(points), strict=True), _STYLES[choice], marker=".", label=server,
                color=_COLOURS[servers.index(server) % len(_COLOURS)],
            )  # fmt: skip
        ticks = sorted({int(record.case["tenants"] or 0) for record in here})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.set_title(f"{level} request{'s' if level > 1 else ''} at a time", fontsize=9)
        panel.set_xlabel("tenants", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    for panel in panels:
        panel.axhline(1, color="#888888", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("share of the server's own base", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    by_label: dict[str, Any] = {}
    for label, handle in zip(labels, handles, strict=True):
        by_label.setdefault(label, handle)  # the solid line, which comes first
    figure.legend(
        by_label.values(), by_label.keys(), fontsize=8, frameon=False, ncols=len(servers) or 1,
        loc="outside lower center",
    )  # fmt: skip
    figure.suptitle(
        f"Output tokens a second over HTTP; {found.machine['cores']} cores\n"
        "solid: tenants chosen evenly, dashed: by Zipf's law",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(records: list[Record]) -> _Lines:
    lines: _Lines = {}
    for record in records:
        of_peer = record.peer_name is not None
        share = record.peer if of_peer else record.ours
        if share is None:
            continue
        point = (int(record.case["tenants"] or 0), share)
        chosen = str(record.case["mixture"])
        server = str(record.case["server"])
        lines.setdefault((server, chosen), []).append(point)
        if point[0] == 1:  # one tenant can be chosen in one way only; both lines begin there
            lines.setdefault((server, "zipf"), []).append(point)
    return lines
