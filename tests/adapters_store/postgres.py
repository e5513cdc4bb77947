"""A PostgreSQL server for tests, on a socket of its own; None where none is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_START_SECONDS = 60


def binaries() -> Path | None:
    """Where initdb and postgres are."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextlib.contextmanager
def running_server(where: Path) -> Iterator[str]:
    """Yield a URL, ``postgresql://...`` with ``{database}`` to be filled in."""
    folder = Path(tempfile.mkdtemp(prefix="spallm-pg-"))
    # It refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")
    data = folder / "data"
    command = [where / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)
    options = [
        "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off",
        "-c", "shared_buffers=16MB",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [where / "postgres", *options], stdout=log, stderr=log, cwd=folder, **user
        )
    try:
        url = f"postgresql://postgres@/{{database}}?host={folder}"
        _wait(where, folder, server)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # does not wait for clients to go
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(where: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    ready = [where / "pg_isready", "-h", folder, "-q"]
    while subprocess.run(ready, check=False).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.1)
