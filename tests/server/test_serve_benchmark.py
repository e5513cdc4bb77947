"""The client, the mixtures and the figures of the load over HTTP, against a server that fakes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from safetensors.torch import load, save, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spallm_serve.benchmarks.records import BenchmarkResults, Record
from spallm_serve.benchmarks.serve_cells import Plan, cell_records, measure_cells
from spallm_serve.benchmarks.serve_client import Ask, Target, percentile, run_load
from spallm_serve.benchmarks.serve_mixture import PROMPT_TOKENS, Asking, Mixture, chosen, mixtures
from spallm_serve.benchmarks.serve_mover import version
from spallm_serve.benchmarks.serve_ours import Tenants
from spallm_serve.benchmarks.serve_plot import plot_serve
from spallm_serve.benchmarks.serve_process import server_process
from spallm_serve.benchmarks.serve_swaps import swap_records
from spallm_serve.benchmarks.weights import weights_record
from spallm_serve.errors import UserError

FIRST_S, GAP_S = 0.15, 0.05
KEY = "secret"


class Fake:
    """Streams as the engine does; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, list[int]]] = []
        self.uploads: list[bytes] = []
        self.now = self.most = 0

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        model = body["model"]
        self.asked.append((model, request.headers.get("authorization"), body["prompt"]))
        if model == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        return StreamingResponse(self._events(model, body["max_tokens"]))

    async def put(self, request: Request) -> Response:
        self.uploads.append(await request.body())
        return JSONResponse({}, 201)

    async def _events(self, model: str, tokens: int) -> AsyncIterator[str]:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(FIRST_S)
        yield ": a comment\n\n" + _event([1])
        left = tokens - (2 if model == "short" else 1)
        while left > 0:
            await asyncio.sleep(GAP_S)
            if model == "broken":
                yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
                return
            step = min(left, 2 if model == "pairs" else 1)
            yield _event([1] * step)
            left -= step
        yield 'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
        self.now -= 1


def _event(token_ids: list[int]) -> str:
    return f"data: {json.dumps({'choices': [{'text': '', 'token_ids': token_ids}]})}\n\n"


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    state = Fake()
    routes = [
        Route("/v1/completions", state.complete, methods=["POST"]),
        Route("/v1/adapters/tuned", state.put, methods=["PUT"]),
    ]
    app = Starlette(routes=routes)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield state, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_first_tokens_and_gaps_are_timed_apart(fake: tuple[Fake, str]) -> None:
    state, url = fake
    load_ = run_load(url, [Ask(Target("base", KEY), [5, 6])], 1, 6)
    (stream,) = load_.streams
    assert state.asked == [("base", f"Bearer {KEY}", [5, 6])]
    assert stream.tokens == 6
    assert len(stream.gaps_s) == 5
    # From below only: a busy machine may be late.
    assert stream.first_s >= FIRST_S
    assert all(gap > GAP_S / 2 for gap in stream.gaps_s)
    assert sum(stream.gaps_s) >= 4.5 * GAP_S
    assert load_.seconds >= stream.first_s + sum(stream.gaps_s)
    assert load_.tokens_per_s == pytest.approx(6 / load_.seconds)


def test_an_event_with_several_tokens_is_one_gap(fake: tuple[Fake, str]) -> None:
    (stream,) = run_load(fake[1], [Ask(Target("pairs"), [5])], 1, 5).streams
    assert (stream.tokens, len(stream.gaps_s)) == (5, 2)
    assert fake[0].asked[0][1] is None


def test_requests_run_as_many_at_a_time_as_was_said(fake: tuple[Fake, str]) -> None:
    state, url = fake
    found = run_load(url, [Ask(Target("base"), [5])] * 8, 4, 2)
    assert len(found.streams) == 8
    assert state.most == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [("unknown", "404.*no such model"), ("broken", "out of memory"), ("short", "with 3 tokens")],
)
def test_a_failed_request_fails_the_measurement(
    fake: tuple[Fake, str], model: str, message: str
) -> None:
    asks = [Ask(Target("base"), [5]), Ask(Target(model), [5])]
    with pytest.raises(UserError, match=message):
        run_load(fake[1], asks, 2, 4)


def test_a_server_that_is_not_there_fails_the_measurement() -> None:
    with pytest.raises(UserError, match="the request failed"):
        run_load("http://127.0.0.1:9", [Ask(Target("base"), [5])], 1, 4)


def test_percentiles_lie_between_neighbours() -> None:
    values = [float(number) for number in range(100, -1, -1)]
    assert percentile(values, 0.99) == 99
    assert percentile(values, 0.5) == 50
    assert percentile([1.0, 2.0], 0.75) == pytest.approx(1.75)
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([3.0, 1.0], 1.0) == 3.0


def test_zipf_asks_the_kth_tenant_a_kth_as_often_as_the_first() -> None:
    count = 20_000
    found = Counter(chosen(Mixture(8, "zipf"), count, seed=0))
    whole = sum(1 / rank for rank in range(1, 9))
    for place in range(8):
        assert found[place] / count == pytest.approx(1 / (place + 1) / whole, rel=0.1)
    evenly = Counter(chosen(Mixture(8, "uniform"), count, seed=0))
    assert set(evenly) == set(range(8))
    assert max(evenly.values()) < 1.15 * min(evenly.values())
    assert chosen(Mixture(8, "zipf"), 20, seed=3) == chosen(Mixture(8, "zipf"), 20, seed=3)


def test_mixtures_and_their_requests() -> None:
    assert mixtures([0, 1, 8]) == [
        Mixture(0, "base"), Mixture(1, "uniform"), Mixture(8, "uniform"), Mixture(8, "zipf"),
    ]  # fmt: skip
    asking = Asking(Target("base"), [Target(str(number)) for number in range(8)], 200)
    asks = [*asking.mixed(Mixture(0, "base"), 3, seed=0), *asking.mixed(Mixture(8, "zipf"), 9, 0)]
    assert [ask.target.model for ask in asks[:3]] == ["base"] * 3
    assert len({tuple(ask.prompt) for ask in asks}) == 12
    assert all(len(ask.prompt) == PROMPT_TOKENS and max(ask.prompt) < 200 for ask in asks)


def test_cells_are_measured_and_put_beside_ours(fake: tuple[Fake, str], tmp_path: Path) -> None:
    plan = Plan((1, 2), tuple(mixtures([1, 2])), requests=1, tokens=2, slots=2, rounds=2)
    asking = Asking(Target("base"), [Target("a"), Target("b")], 200)
    cells = dict(measure_cells(fake[1], asking, plan))
    assert {(cell.concurrency, cell.mixture.tenants, cell.mixture.choice) for cell in cells} == {
        (concurrency, *mixture)
        for concurrency in (1, 2)
        for mixture in ((0, "base"), (1, "uniform"), (2, "uniform"), (2, "zipf"))
    }
    records = list(cell_records("spallm", cells))
    by_metric = {r.metric: r for r in records if r.case["tenants"] == 2}
    assert by_metric["share_of_base_only"].better == "higher"
    assert by_metric["ttft_median_s"].ours and by_metric["ttft_median_s"].ours >= FIRST_S
    peers = list(cell_records("peer", cells, cells))
    assert [record.ratio for record in peers] == [1.0] * len(records)
    assert all(record.ours == record.peer and record.peer_name == "peer" for record in peers)
    found = BenchmarkResults(machine={"cores": 2}, versions={}, command="", records=records + peers)
    plot_serve(found, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000


def test_a_server_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; print(sys.argv[1:3]); sys.exit('no memory')",
        "--",
    ]
    with (
        pytest.raises(UserError, match=r"ended with 1(?s:.*)--host(?s:.*)no memory"),
        server_process(command, tmp_path / "log", "/health", {}),
    ):
        pass


def test_a_server_and_its_clients_share_the_processors_by_their_priorities(tmp_path: Path) -> None:
    """Linux gives each session an equal share: a client's lower priority would mean nothing."""
    program = (
        "import http.server, os, sys;"
        "open(sys.argv[1], 'w').write(f'{os.getsid(0)} {os.getpgid(0)}');"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])),"
        " http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "told")]
    with server_process(command, tmp_path / "log", "/", {}) as started:
        session, group = (int(word) for word in (tmp_path / "told").read_text().split())
        assert session == os.getsid(0)
        assert group == started.process.pid  # Ctrl-C is not for it


def test_versions_differ_in_their_last_values_only() -> None:
    tensors = save({"tables": torch.arange(16, dtype=torch.float16)})
    found = [load(version(tensors, number))["tables"] for number in (0, 1, 0x4000, 300_000)]
    assert len({tuple(each.tolist()) for each in found}) == 4
    for each in found:
        assert each.isfinite().all()
        assert each[:-2].tolist() == list(range(14))


def test_a_stream_is_timed_alone_and_while_another_tenant_swaps(
    fake: tuple[Fake, str], tmp_path: Path
) -> None:
    """The other tenant is a process, as in the measurement itself."""
    state, url = fake
    save_file(
        {"tables": torch.zeros(8, dtype=torch.float16)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    tenants = Tenants(Target("base"), [Target("tuned", KEY)], Target("tuned", "mover"), "admin")
    asking = Asking(tenants.base, tenants.adapters, 200)
    records = list(swap_records(url, tenants, tmp_path, asking, requests=2, tokens=3, rounds=1))
    alone, asks, swaps, for_a_token, over_alone, over_asks, token_over_alone = records
    assert alone.ours and asks.ours and swaps.ours and for_a_token.ours
    assert over_alone.ours == pytest.approx(swaps.ours / alone.ours, rel=0.01)
    assert over_asks.ours == pytest.approx(swaps.ours / asks.ours, rel=0.01)
    assert token_over_alone.ours == pytest.approx(for_a_token.ours / alone.ours, rel=0.01)
    asked = [each for each in state.asked if each[1] == "Bearer mover"]
    assert len(asked) > len(state.uploads) >= 3, "one that only asks uploads once"
    assert len(set(state.uploads)) == len(state.uploads)
    assert over_alone.case["others_answers_per_s"] == swaps.case["others_answers_per_s"] > 0
    assert asks.case["others_answers_per_s"]


def test_weights_count_codes_and_tables_and_no_estimators(tmp_path: Path) -> None:
    dense, base = tmp_path / "dense", tmp_path / "base"
    dense.mkdir()
    base.mkdir()
    save_file({"w": torch.zeros(8, 16, dtype=torch.bfloat16)}, dense / "model.safetensors")
    compressed = {
        "w.codes": torch.zeros(4, 8, 2, dtype=torch.uint8),
        "w.tables": torch.zeros(8, 1, 16, dtype=torch.float16),
        "w.estimator_a": torch.zeros(99),
    }
    save_file(compressed, base / "model.safetensors")
    record: Record = weights_record(dense, base)
    assert (record.ours, record.peer) == (64 + 256, 256)
    assert record.ratio == 0.8
