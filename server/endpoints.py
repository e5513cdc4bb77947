"""The entry point ``vllm.endpoint_plugins``: our routes, and the way adapters come."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from rich.console import Console
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from spallm_serve.server import runtime
from spallm_serve.server.errors import ApiError
from spallm_serve.server.residency import Residency
from spallm_serve.server.routes import adapters, answers, health, models, operations
from spallm_serve.server.settings import ServerSettings
from spallm_serve.server.vllm_compat import forget_adapter

NAME = "spallm-endpoints"
_LOAD_SECONDS = 60.0
_FLUSH_SECONDS = 2.0
_WATCH_SECONDS = 5.0
_ADAPTER = "/v1/adapters/{name:path}"
_ACTION = answers.body(adapters.Action)
# Method, path, endpoint, what it answers with, and what it takes.
_ROUTES: tuple[tuple[str, str, Any, type[BaseModel], dict[str, Any]], ...] = (
    ("GET", "/livez", health.livez, answers.Status, {}),
    ("GET", "/readyz", health.readyz, answers.Status, {}),
    ("GET", "/v1/models", models.list_models, answers.ModelCards, {}),
    ("GET", "/v1/models/{model:path}", models.get_model, answers.ModelCard, answers.MODEL),
    ("GET", "/v1/usage", operations.usage, answers.Usages, answers.USAGE),
    ("GET", "/v1/residency", operations.residency, answers.Workers, {}),
    ("POST", "/v1/residency", operations.pin, answers.Pinned, answers.body(operations.Pin)),
    ("GET", "/v1/adapters", adapters.list_adapters, answers.AdapterInfos, {}),
    ("POST", "/v1/adapters:validate", adapters.validate_adapter, answers.Valid, answers.UPLOAD),
    ("PUT", _ADAPTER, adapters.put_adapter, answers.Stored, answers.NAMED | answers.UPLOAD),
    ("GET", _ADAPTER, adapters.get_adapter, answers.AdapterWithReleases, answers.NAMED),
    ("POST", _ADAPTER, adapters.act_on_adapter, answers.Done, answers.NAMED | _ACTION),
    ("DELETE", _ADAPTER, adapters.delete_adapter, answers.Deleted, answers.NAMED_VERSION),
)


class SpallmEndpoints:
    """Our routes, for vLLM's server."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; those of vLLM's with the same path and method are replaced."""
        for method, path, endpoint, answer, takes in _ROUTES:
            app.add_api_route(
                path,
                endpoint,
                methods=[method],
                response_model=None,
                responses={200: {"model": answer}, "default": {"model": answers.Refusal}},
                openapi_extra=takes,
            )
        app.add_exception_handler(ApiError, _refused)
        # Now, not with the state: vLLM looks for resolvers before that.
        LoRAResolverRegistry.register_resolver(NAME, _GateResolver())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """The engine runs: from now on adapters can be brought to it."""
        here = runtime.current()

        async def call(method: str, arguments: tuple[Any, ...]) -> list[Any]:
            answers: list[Any] = await engine_client.collective_rpc(method, args=arguments)
            return answers

        async def decode() -> None:
            sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            prompt = {"prompt_token_ids": [0]}
            async for _ in engine_client.generate(prompt, sampling, f"ready-{id(object())}"):
                pass

        def forget(name: str) -> None:
            forget_adapter(state, name)

        here.residency = Residency(
            here.store.local_folder, call, _LOAD_SECONDS, here.tiers.found, forget
        )
        _say_capacity(here.settings, (await here.residency.facts())[0])
        state.spallm_readiness = health.Readiness(decode, here.settings.ready_seconds)
        state.spallm_flushing = asyncio.create_task(_flush_for_ever(here))
        state.spallm_watching = asyncio.create_task(_watch_for_ever(here))


class _GateResolver(LoRAResolver):  # type: ignore[misc]
    """Only what the gate has let in has a folder; a client's word reaches no path."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See vLLM; it gives the request its number."""
        folder = runtime.current().engine().folder(lora_name)
        return None if folder is None else LoRARequest(lora_name, 1, folder)


def _say_capacity(settings: ServerSettings, facts: dict[str, Any]) -> None:
    slot, slots = facts["slot_bytes"], settings.slots + settings.pinned_slots
    Console(stderr=True, highlight=False).print(
        f"{slots} slots of {slot / 1e6:.2f} MB hold {slots * slot / 1e6:.1f} MB "
        f"of tables beside the base's; {settings.host_bytes / 1e6:.0f} MB of memory for others",
        soft_wrap=True,
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _flush_for_ever(here: runtime.Runtime) -> None:
    while True:
        await asyncio.sleep(_FLUSH_SECONDS)
        try:
            await asyncio.to_thread(here.usage.flush)
        except Exception:  # the next time it may work
            continue


async def _watch_for_ever(here: runtime.Runtime) -> None:
    """The workers' counts for ``/metrics``; an engine that has died says so elsewhere."""
    while True:
        with suppress(Exception):
            here.tiers.update(await here.engine().facts())
        await asyncio.sleep(_WATCH_SECONDS)
