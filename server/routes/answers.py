"""What our routes answer with and take, for the OpenAPI document; a test compares it with them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from spallm_serve.adapters_store.records import AdapterInfo, PutResult, Release, UsageRow
from spallm_serve.server.upload import CONFIG_PART, TENSOR_PART

_TEXT = {"type": "string"}
_FILE = _TEXT | {"format": "binary"}
_NAME = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
_IN_QUERY = {"in": "query", "required": False, "schema": _TEXT}
_DAY = _IN_QUERY | {"schema": _TEXT | {"format": "date"}}
_FORM = {
    "type": "object",
    "properties": {CONFIG_PART: _FILE, TENSOR_PART: _FILE},
    "required": [CONFIG_PART, TENSOR_PART],
    "additionalProperties": False,
}
NAMED: dict[str, Any] = {"parameters": [_NAME]}
NAMED_VERSION: dict[str, Any] = {"parameters": [_NAME, _IN_QUERY | {"name": "version"}]}
MODEL: dict[str, Any] = {"parameters": [_NAME | {"name": "model"}]}
USAGE: dict[str, Any] = {
    "parameters": [_DAY | {"name": "from"}, _DAY | {"name": "to"}, _IN_QUERY | {"name": "tenant"}]
}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body."""
    return _body("application/json", model.model_json_schema())


UPLOAD = _body("multipart/form-data", _FORM)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Answer):
    """Why a request was refused; see OpenAI's error format."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(_Answer):
    """All that a refusal says."""

    error: Problem


class Status(_Answer):
    """Of the process or the engine."""

    status: str
    reason: str | None = None


class ModelCard(_Answer):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    kind: str | None = None


class ModelCards(_Answer):
    """Those of a tenant."""

    object: Literal["list"]
    data: list[ModelCard]


class Usages(_Answer):
    """By tenant, adapter and day."""

    object: Literal["list"]
    data: list[UsageRow]


class Workers(_Answer):
    """What is where, worker by worker."""

    workers: list[dict[str, Any]]


class Pinned(_Answer):
    """What was done with an adapter's slot."""

    done: Literal["pin", "unpin"]
    adapter: str


class AdapterInfos(_Answer):
    """Those that a tenant sees."""

    object: Literal["list"]
    data: list[AdapterInfo]


class AdapterWithReleases(AdapterInfo):
    """One's own has its history."""

    releases: tuple[Release, ...] = ()


class Stored(PutResult):
    """An upload that was taken."""

    model: str


class Valid(_Answer):
    """An upload that would be taken."""

    valid: Literal[True]
    kind: str
    digest: str
    base_digest: str


class Deleted(_Answer):
    """The versions that are gone."""

    deleted: list[str]


class Done(_Answer):
    """What was done; with the release that it made, if it did."""

    done: str
    revision: int | None = None
    digest: str | None = None
    restores: int | None = None
    key_id: str | None = None
    moved_at: str | None = None
