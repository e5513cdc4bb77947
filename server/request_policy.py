"""What a tenant may ask of the engine, and what is put into a request before it gets there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spallm_serve.server.errors import ApiError

# Field -> why it is not for tenants.
REFUSED = {
    "chat_template": "templates are programs; the base's own is used",
    "prompt_embeds": "embeddings are deserialised in the engine",
    "mm_processor_kwargs": "it changes what preprocessing may use",
    "media_io_kwargs": "it changes what preprocessing may use",
    "kv_transfer_params": "it names other engines' caches",
    "ec_transfer_params": "it names other engines' caches",
    "vllm_xargs": "it goes to the engine as it is",
    "previous_response_id": "responses are not stored; send the whole conversation",
    "background": "responses are not stored; stream instead",
    "priority": "all tenants queue alike",
    "request_id": "ids of requests are the server's",
    "session_id": "ids of sessions are the server's",
}
# What a template's own switches may not smuggle in.
_REFUSED_TEMPLATE_SWITCHES = ("chat_template", "tokenize", "tools", "documents")
# What holds a schema, a grammar or words that the engine compiles.
_TEXTS = (
    "response_format", "structured_outputs", "tools", "text", "output_config", "stop",
    "stop_sequences", "bad_words",
)  # fmt: skip


@dataclass(frozen=True)
class RequestCaps:
    """Limits of one request, whatever the tenant's quota.

    Attributes:
        choices: sequences generated for each of its prompts.
        prompts: of a completion that is asked for several at once.
        tokens: generated for each of them.
        grammar_bytes: of a JSON schema, pattern or grammar, and of all words to stop at or avoid.
        stop_sequences: texts to stop at.
        listed_tokens: that are allowed, biased, to stop at, or to tell the likelihood of.
    """

    choices: int = 8
    prompts: int = 32
    tokens: int = 8192
    grammar_bytes: int = 16_384
    stop_sequences: int = 16
    listed_tokens: int = 1024


def prepare_request(
    body: dict[str, Any], engine_model: str, salt: str, caps: RequestCaps
) -> dict[str, Any]:
    """A request as the engine shall see it.

    Args:
        body: as the tenant sent it; left as it is.
        engine_model: what ``model`` was resolved to.
        salt: of the tenant; whatever salt was sent is overwritten.
        caps: limits of one request.

    Returns:
        A new body.

    Raises:
        ApiError: a field that is not for tenants, or a value over its cap; 400.
    """
    for field, reason in REFUSED.items():
        # Clients send nulls and false for what they do not use.
        if body.get(field):
            raise _refused(field, f"{field} cannot be set: {reason}")
    switches = body.get("chat_template_kwargs")
    if isinstance(switches, dict):
        for name in _REFUSED_TEMPLATE_SWITCHES:
            if name in switches:
                raise _refused("chat_template_kwargs", f"chat_template_kwargs cannot set {name!r}")
    # The engine would take "true" or "1" as well, and what is asked for would not be what was seen.
    if not isinstance(body.get("stream"), bool | None):
        raise _refused("stream", "stream: expected true or false")
    _check_caps(body, caps)
    prepared = {name: value for name, value in body.items() if name not in REFUSED}
    prepared |= {"model": engine_model, "cache_salt": salt}
    if "store" in body:
        prepared["store"] = False
    return prepared


def _check_caps(body: dict[str, Any], caps: RequestCaps) -> None:
    for field in ("n", "best_of"):
        _at_most(body, field, caps.choices)
    if body.get("use_beam_search"):
        raise _refused("use_beam_search", "beam search is not served")
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"):
        _at_most(body, field, caps.tokens)
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and any(isinstance(each, str | list) for each in prompt)
    if isinstance(prompt, list) and several and len(prompt) > caps.prompts:
        raise _refused("prompt", f"{len(prompt)} prompts in one request, at most {caps.prompts}")
    for field in ("stop", "stop_sequences"):
        _no_longer(body, field, caps.stop_sequences)
    for field in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
        _no_longer(body, field, caps.listed_tokens)
    for field in _TEXTS:
        size = _text_size(body.get(field), caps.grammar_bytes)
        if size > caps.grammar_bytes:
            raise _refused(field, f"{field} holds more than {caps.grammar_bytes} characters")


def _no_longer(body: dict[str, Any], field: str, limit: int) -> None:
    value = body.get(field)
    if isinstance(value, list | dict) and len(value) > limit:
        raise _refused(field, f"{field} has {len(value)} entries, at most {limit} are taken")


def _at_most(body: dict[str, Any], field: str, limit: int) -> None:
    value = body.get(field)
    # The engine would take "8" for 8.
    if not isinstance(value, int | float | None):
        raise _refused(field, f"{field}: expected a number")
    if value is not None and not value <= limit:
        raise _refused(field, f"{field} is {value}, at most {limit} can be asked for")


def _text_size(value: object, enough: int) -> int:
    """Characters in all names and values below something, counted until there are enough."""
    size, waiting = 0, [value]
    while waiting and size <= enough:
        here = waiting.pop()
        if isinstance(here, dict):
            waiting += [*here.keys(), *here.values()]
        elif isinstance(here, list):
            waiting += here
        size += len(here) if isinstance(here, str) else 1
    return size


def _refused(field: str, message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param=field)
