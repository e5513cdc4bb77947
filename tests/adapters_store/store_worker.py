"""A process that works on a store, for tests to race against and to kill.

Run as a module with a folder and a database's URL; reads one JSON list per line, a command and its
arguments, and answers with one JSON value per line.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from itertools import count
from pathlib import Path

from spallm_serve.adapters_store.failures import ConflictError, StoreError
from spallm_serve.adapters_store.records import Principal, Scope
from spallm_serve.adapters_store.store import AdapterStore
from tests.adapters_store.stored import ADMIN, location, lut, opened

ACME = Principal(tenant="acme", scopes=frozenset({Scope.ADAPTERS}), key_id="worker")


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def move(store: AdapterStore, digest: str, expected: str) -> None:
    """Answers whether it won."""
    try:
        store.adapters.move(ACME, "acme", "support", digest, expected)
    except ConflictError:
        say(False)
    else:
        say(True)


def put(store: AdapterStore, seed: int) -> None:
    """Answers whether it was this put that created the version."""
    with tempfile.TemporaryDirectory() as folder:
        paths = lut(seed).write(Path(folder))
        say(store.put(ACME, "acme", "support", *paths).created)


def churn(store: AdapterStore, seed: int) -> None:
    """Put, move, roll back and collect for ever, and say what is done before and after it."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for step in count():
            current = store.adapters.get("acme", "acme", "support")
            assert current.released is not None
            other = choose.choice(current.versions).digest
            kind = ("put", "move", "rollback", "collect", "put", "move")[step % 6]
            paths = lut(seed * 1000 + step).write(Path(folder))
            if kind == "put":
                other = store.validate(ACME, *paths).digest
            say(["will", kind, other])
            try:
                if kind == "put":
                    store.put(ACME, "acme", "support", *paths)
                elif kind == "move":
                    store.adapters.move(ACME, "acme", "support", other, current.released.digest)
                elif kind == "rollback":
                    other = store.adapters.rollback(ACME, "acme", "support").digest
                else:
                    other = current.released.digest
                    store.collect(ADMIN, grace=0)
            except StoreError:  # there was nothing to roll back to
                other = current.released.digest
            say(["did", kind, other])


COMMANDS = {"move": move, "put": put, "churn": churn}


def main() -> None:
    folder, database = sys.argv[1:]
    with opened(location(Path(folder), database)) as store:
        say("ready")
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            COMMANDS[command](store, *arguments)


if __name__ == "__main__":
    main()
