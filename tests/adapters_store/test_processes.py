"""Several processes on one store: they take turns, and killing one at any moment harms nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.adapters_store.catalog import Catalog
from spallm_serve.adapters_store.store import AdapterStore
from tests.adapters_store.stored import ADMIN, blob_count, location, lut, opened, tenant

ROOT = Path(__file__).parents[2]
_KILLS = 5


class Worker:
    """:mod:`tests.adapters_store.store_worker` in a process of its own."""

    def __init__(self, folder: Path, database: str) -> None:
        command = [sys.executable, "-m", "tests.adapters_store.store_worker"]
        self.process = subprocess.Popen(
            [*command, str(folder), database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def ask(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@contextmanager
def workers(number: int, folder: Path, database: str) -> Iterator[list[Worker]]:
    found = [Worker(folder, database) for _ in range(number)]
    try:
        for worker in found:
            assert worker.answer() == "ready"
        yield found
    finally:
        for worker in found:
            worker.process.kill()
            worker.process.communicate()


def put_some(store: AdapterStore, count: int, where: Path) -> list[str]:
    acme = tenant(store, "acme")
    return [
        store.put(acme, "acme", "support", *lut(seed).write(where / "upload")).version.digest
        for seed in range(count)
    ]


def test_of_two_that_move_one_name_one_wins(database: str, tmp_path: Path) -> None:
    with opened(location(tmp_path, database)) as store:
        a, b, c = put_some(store, 3, tmp_path)
        current, wins = c, [0, 0]
        with workers(2, tmp_path, database) as pair:
            for _ in range(20):
                targets = [digest for digest in (a, b, c) if digest != current]
                for worker, target in zip(pair, targets, strict=True):
                    worker.ask("move", target, current)
                won = [worker.answer() for worker in pair]
                assert sorted(won) == [False, True]
                wins[won.index(True)] += 1
                current = targets[won.index(True)]
                found = store.adapters.resolve("acme", "support")
                assert found is not None and found.digest == current
        assert len(store.adapters.history(ADMIN, "acme", "support")) == 3 + 20


def test_of_two_that_put_the_same_one_creates(database: str, tmp_path: Path) -> None:
    with opened(location(tmp_path, database)) as store:
        put_some(store, 1, tmp_path)
        with workers(2, tmp_path, database) as pair:
            for seed in range(10, 20):
                for worker in pair:
                    worker.ask("put", seed)
                assert sorted(worker.answer() for worker in pair) == [False, True]
        assert len(store.adapters.get("acme", "acme", "support").versions) == 11
        # Ten puts and the first: not one more was noted.
        assert len(store.audit.entries(ADMIN, action="adapter.put")) == 11


def test_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Again and again: start, kill within a second, look; the next goes on from there."""
    where = location(tmp_path)
    with opened(where) as store:
        before = put_some(store, 2, tmp_path)[-1]
    for kill in range(_KILLS):
        said = _churn_and_kill(kill, tmp_path, where.database)
        # It did the last thing that it said it was about to do, or did not.
        possible = (
            {before, *(digest for _, _, digest in said)}
            if len(said) < 2
            else {digest for _, _, digest in said[-2:]}
        )
        rolling_back = said[-1][:2] == ["will", "rollback"]  # to what, is not said before
        put = {digest for when, kind, digest in said if (when, kind) == ("did", "put")}
        before = _expect_whole(tmp_path, None if rolling_back else possible, put)


def _churn_and_kill(seed: int, folder: Path, database: str) -> list[list[str]]:
    """What the worker said until it was killed."""
    lines: list[str] = []
    with workers(1, folder, database) as (worker,):
        worker.ask("churn", seed)
        assert worker.process.stdout is not None
        lines.append(worker.process.stdout.readline())
        delay = random.Random(seed).uniform(0.05, 1.0)
        threading.Timer(delay, worker.process.kill).start()
        lines += worker.process.stdout
        assert worker.process.wait() == -9
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _expect_whole(folder: Path, possible: set[str] | None, put: set[str]) -> str:
    """What is released now: one of the possible ones, and all that was put is there."""
    with opened(location(folder)) as store:
        info = store.adapters.get("acme", "acme", "support")
        assert info.released is not None
        assert possible is None or info.released.digest in possible
        versions = {version.digest for version in info.versions}
        assert put <= versions
        for digest in versions:
            assert adapter_digest(read_adapter(store.local_folder(digest))) == digest
        moves = store.adapters.history(ADMIN, "acme", "support")
        assert [move.revision for move in moves] == list(range(len(moves), 0, -1))
        assert moves[0].digest == info.released.digest
        store.collect(ADMIN, grace=0)
        assert blob_count(folder) == len(versions) + 1  # and their one configuration
        folders = {path.name for path in (folder / "adapters").iterdir()}
        assert folders == versions
    catalog = Catalog(location(folder).database)
    with catalog.read() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    catalog.close()
    return info.released.digest
