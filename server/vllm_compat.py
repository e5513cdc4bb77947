"""All of vLLM's private names that we touch, and the versions for which they were tried.

vLLM loads adapters through a manager whose class is named in one place. For models of ours that
class is replaced by :class:`SlotManager`; for all others it stays vLLM's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.worker import lora_model_runner_mixin as mixin
from vllm.version import __version__ as VLLM_VERSION

from spallm_serve.errors import UserError
from spallm_serve.server.host_adapter import HostAdapter, Place, ServedLayers, load_host_adapter
from spallm_serve.server.host_tier import HostTier
from spallm_serve.server.quantization import SpallmQuantization
from spallm_serve.server.slots import BASE_SLOT, SlotBook
from spallm_serve.server.slotted import SlottedLinear, StepSlots

TESTED_VERSIONS = ("0.32.",)
# Where the host tier's budget is put for the workers; they are processes of their own.
HOST_BYTES_KEY = "spallm_host_bytes"
_DEFAULT_HOST_BYTES = 2 << 30
_STOCK_MANAGER = "LRUCacheWorkerLoRAManager"
# What vLLM names the adapters it warms up with, and its id of none.
_WARM_UP_PATH = "/not/a/real/path"
_NO_ADAPTER = 0


def check_version(version: str = VLLM_VERSION) -> None:
    """Refuse a vLLM whose insides have not been tried.

    Raises:
        UserError: names it and those that were.
    """
    if not version.startswith(TESTED_VERSIONS):
        tried = ", ".join(f"{tested}*" for tested in TESTED_VERSIONS)
        raise UserError(
            f"vLLM {version} is installed; this release of spallm-serve works with vLLM {tried}"
        )


def install() -> None:
    """Let models of ours have their adapters in slots; done once in a process.

    Raises:
        UserError: see :func:`check_version`.
    """
    check_version()
    stock = getattr(mixin, _STOCK_MANAGER)
    if not isinstance(stock, partial):
        setattr(mixin, _STOCK_MANAGER, partial(_make_manager, stock))


def _make_manager(
    stock: type, vllm_config: VllmConfig, device: torch.device, *args: Any, **more: Any
) -> Any:
    if isinstance(vllm_config.quant_config, SpallmQuantization):
        return SlotManager(vllm_config, device)
    return stock(vllm_config, device, *args, **more)


class SlotManager:
    """A worker's adapters, in the place of vLLM's manager.

    Args:
        vllm_config: of a model of ours, with a LoRA configuration.
        device: of the worker.
    """

    is_enabled = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self._quantization: SpallmQuantization = vllm_config.quant_config
        self._dtype = vllm_config.model_config.dtype
        self._device = device
        self._book: SlotBook[int] = SlotBook(vllm_config.lora_config.max_loras)
        budget = vllm_config.additional_config.get(HOST_BYTES_KEY, _DEFAULT_HOST_BYTES)
        self._host: HostTier[HostAdapter] = HostTier(self._load, budget)
        self._folders: dict[int, str] = {}
        self._served: ServedLayers

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
        """Find the compressed layers; the model stays as it is."""
        layers: dict[str, SlottedLinear] = {}
        places: dict[str, Place] = {}
        module: Any
        for module in model.modules():
            if hasattr(module, "spallm_places"):
                layers[module.prefix] = module.spallm
                places |= module.spallm_places
        self._served = ServedLayers(self._quantization.sketch.base_digest, layers, places)
        return model

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Before each step: every adapter it needs into a slot, and every token to its slot."""
        if any(request.lora_path == _WARM_UP_PATH for request in requests):
            self._quantization.step = self._quantization.sampled = StepSlots()
            return
        needed = {request.lora_int_id for request in requests}
        for request in requests:
            self._activate(request, needed)
        self._quantization.step = self._step(mapping.index_mapping)
        self._quantization.sampled = self._step(mapping.prompt_mapping)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Have an adapter in memory.

        Raises:
            UserError: it cannot be used on this base.
        """
        self._host.get(request.lora_path)
        self._folders[request.lora_int_id] = request.lora_path
        return True

    def prefetch(self, folder: str) -> str:
        """Begin to load an adapter in a thread; never waits.

        Returns:
            ``loading``, ``ready``, or why it cannot be used.
        """
        future = self._host.prefetch(folder)
        if not future.done():
            return "loading"
        problem = future.exception()
        return "ready" if problem is None else str(problem)

    def remove_adapter(self, adapter: int) -> bool:
        """Forget an adapter, in its slot and in memory."""
        self._book.release(adapter)
        folder = self._folders.pop(adapter, None)
        if folder is not None:
            self._host.drop(folder)
        return folder is not None

    def remove_all_adapters(self) -> None:
        """Forget all."""
        for adapter in list(self._folders):
            self.remove_adapter(adapter)

    def pin_adapter(self, adapter: int) -> bool:
        """Keep an adapter in its slot."""
        return self._book.pin(adapter)

    def list_adapters(self) -> set[int]:
        """All that have been used or added."""
        return set(self._folders)

    def residency(self) -> dict[str, Any]:
        """What is where, and how much it takes."""
        return {
            "slots": {
                self._folders[adapter]: self._book.slot_of(adapter)
                for adapter in self._book.adapters()
            },
            "host": self._host.folders(),
            "host_bytes": self._host.nbytes,
            "slot_bytes": self._served.slot_bytes,
        }

    def time_swap(self, folder: str, rounds: int) -> float:
        """Median seconds to bring an adapter from memory into a slot; for benchmarks.

        Args:
            folder: of the adapter; nobody may be using any.
            rounds: how often.
        """
        held = self._host.get(folder)
        times = []
        for _ in range(rounds):
            slot = self._book.reserve(())
            started = time.perf_counter()
            held.fill(self._served, slot)
            times.append(time.perf_counter() - started)
            self._book.give_back(slot)
        return statistics.median(times)

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """vLLM warms up with adapters that do not exist; here the base does as well."""
        yield

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """See :meth:`dummy_lora_cache`."""
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """See :meth:`dummy_lora_cache`."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Adapters are for the language model."""
        return False

    def _load(self, folder: str) -> HostAdapter:
        return load_host_adapter(folder, self._served, self._dtype)

    def _activate(self, request: LoRARequest, needed: set[int]) -> None:
        adapter = request.lora_int_id
        if self._book.slot_of(adapter) is not None:
            self._book.touch(adapter)
            return
        self._folders[adapter] = request.lora_path
        held = self._host.get(request.lora_path)
        slot = self._book.reserve(needed)
        try:
            held.fill(self._served, slot)
        except BaseException:
            self._book.give_back(slot)
            raise
        self._book.publish(adapter, slot)

    def _step(self, adapters: tuple[int, ...]) -> StepSlots:
        return StepSlots.of([self._slot(adapter) for adapter in adapters], self._device)

    def _slot(self, adapter: int) -> int:
        if adapter == _NO_ADAPTER:
            return BASE_SLOT
        slot = self._book.slot_of(adapter)
        if slot is None:
            # Never the base's answer in its name.
            raise RuntimeError(f"the step uses adapter {adapter}, which is in no slot")
        return slot


class SlotWorkerExtension:
    """Methods for vLLM's workers, called through ``collective_rpc``; they never wait."""

    model_runner: Any

    def spallm_prefetch(self, folder: str) -> str:
        """See :meth:`SlotManager.prefetch`."""
        manager: SlotManager = self.model_runner.lora_manager
        return manager.prefetch(folder)

    def spallm_time_swap(self, folder: str, rounds: int) -> float:
        """See :meth:`SlotManager.time_swap`."""
        manager: SlotManager = self.model_runner.lora_manager
        return manager.time_swap(folder, rounds)

    def spallm_residency(self) -> dict[str, Any]:
        """See :meth:`SlotManager.residency`."""
        manager: SlotManager = self.model_runner.lora_manager
        return manager.residency()


def serve(flags: list[str]) -> None:
    """Run vLLM's OpenAI server until a signal ends it.

    Args:
        flags: as for ``vllm serve``, the model by ``--model``.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="spallm-serve BASE --"))
    arguments = parser.parse_args(flags)
    validate_parsed_serve_args(arguments)
    uvloop.run(run_server(arguments))
