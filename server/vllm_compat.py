"""All of vLLM's private names that we touch, and the versions for which they were tried.

vLLM loads adapters through a manager whose class is named in one place. For models of ours that
class is replaced by :class:`SlotManager`; for all others it stays vLLM's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin as mixin
from vllm.version import __version__ as VLLM_VERSION

from spallm_serve.checkpoint import QUANT_METHOD
from spallm_serve.errors import UserError
from spallm_serve.server import opaque
from spallm_serve.server.host_adapter import Place, ServedLayers, load_host_adapter
from spallm_serve.server.host_tier import HostTier
from spallm_serve.server.quantization import PINNED_SLOTS_KEY, SpallmQuantization, slot_count
from spallm_serve.server.residency import MOST_NAMES
from spallm_serve.server.resident import ResidentAdapters
from spallm_serve.server.slots import BASE_SLOT
from spallm_serve.server.slotted import SlottedLinear, StepSlots
from spallm_serve.server.slotted_norm import SlottedNorm
from spallm_serve.server.stack_room import with_stack_room

TESTED_VERSIONS = ("0.32.",)
# Where the host tier's budget is put for the workers; they are processes of their own.
HOST_BYTES_KEY = "spallm_host_bytes"
_DEFAULT_HOST_BYTES = 2 << 30
_STOCK_MANAGER = "LRUCacheWorkerLoRAManager"
# What vLLM names the adapters it warms up with, and its id of none.
_WARM_UP_PATH = "/not/a/real/path"
_NO_ADAPTER = 0
# Of adapters; more than a step can use, and than vLLM has at a time.
MOST_NUMBERS = 2 * MOST_NAMES


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
        check = current_platform.check_and_update_config
        current_platform.check_and_update_config = partial(_check_and_update_config, check)


def _check_and_update_config(stock: Callable[[VllmConfig], None], vllm_config: VllmConfig) -> None:
    """Let models of ours be compiled.

    vLLM compiles nothing on a CPU where there may be LoRAs, because those of its own change layers
    that a graph would hold. Of ours it holds the names. CUDA graphs would hold a step's slots.
    """
    if not _is_ours(vllm_config):
        stock(vllm_config)
        return
    loras, vllm_config.lora_config = vllm_config.lora_config, None
    try:
        stock(vllm_config)
    finally:
        vllm_config.lora_config = loras
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def _is_ours(vllm_config: VllmConfig) -> bool:
    """A model of ours, or one that drafts for it, which has the same configuration of compiling."""
    if isinstance(vllm_config.quant_config, SpallmQuantization):
        return True
    drafts = vllm_config.speculative_config
    target = None if drafts is None else drafts.target_model_config
    return target is not None and target.quantization == QUANT_METHOD


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
        self._slots = slot_count(vllm_config)
        self._pins = vllm_config.additional_config.get(PINNED_SLOTS_KEY, 0)
        self._host_bytes = vllm_config.additional_config.get(HOST_BYTES_KEY, _DEFAULT_HOST_BYTES)
        self._folders: OrderedDict[int, str] = OrderedDict()
        self.resident: ResidentAdapters

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
        """Find the compressed layers; the model stays as it is."""
        layers: dict[str, SlottedLinear] = {}
        places: dict[str, Place] = {}
        norms: dict[str, SlottedNorm] = {}
        module: Any
        for name, module in model.named_modules():
            if hasattr(module, "spallm_places"):
                layers[module.prefix] = module.spallm
                places |= module.spallm_places
            elif isinstance(module, RMSNorm | GemmaRMSNorm):
                norms[name] = self._slotted(module, name, vllm_config)
        served = ServedLayers(self._quantization.sketch.base_digest, layers, places, norms)
        host = HostTier(partial(load_host_adapter, served=served, dtype=self._dtype),
                        self._host_bytes)  # fmt: skip
        self.resident = ResidentAdapters(served, host, self._slots, self._pins)
        model.forward = with_stack_room(model.forward)
        return model

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Before each step: every adapter it needs into a slot, and every token to its slot."""
        if any(request.lora_path == _WARM_UP_PATH for request in requests):
            self._quantization.step = self._quantization.sampled = StepSlots()
            return
        self._remember(requests)
        # Not from the requests: vLLM tells those apart by name, and of two numbers that one name
        # had it brings one.
        used = {*mapping.index_mapping, *mapping.prompt_mapping} - {_NO_ADAPTER}
        folders = {number: self._folders[number] for number in used}
        self.resident.activate(set(folders.values()))
        self._quantization.step = self._step(mapping.index_mapping, folders)
        self._quantization.sampled = self._step(mapping.prompt_mapping, folders)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Have an adapter in memory.

        Raises:
            UserError: it cannot be used on this base.
        """
        self.resident.load(request.lora_path)
        self._remember([request])
        return True

    def remove_adapter(self, adapter: int) -> bool:
        """Forget an adapter, in its slot and in memory."""
        folder = self._folders.pop(adapter, None)
        if folder is not None:
            self.resident.forget(folder)
        return folder is not None

    def remove_all_adapters(self) -> None:
        """Forget all."""
        for adapter in list(self._folders):
            self.remove_adapter(adapter)

    def pin_adapter(self, adapter: int) -> bool:
        """Keep an adapter in its slot; False if as many are pinned as may be."""
        return adapter in self._folders and self.resident.pin(self._folders[adapter])

    def list_adapters(self) -> set[int]:
        """All that are in a slot or in memory."""
        known = self.resident.known()
        return {adapter for adapter, folder in self._folders.items() if folder in known}

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

    def _slotted(self, module: Any, name: str, vllm_config: VllmConfig) -> SlottedNorm:
        """Have a normalisation of vLLM's corrected after each use."""
        offset = 1.0 if isinstance(module, GemmaRMSNorm) else 0.0
        epsilon = module.variance_epsilon
        norm = SlottedNorm(len(module.weight), epsilon, offset, self._device)

        def correct(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            # With a residual, their sum comes back beside it, and is what was normalised.
            y, x = output if isinstance(output, tuple) else (output, inputs[0])
            if torch.compiler.is_compiling():
                torch.ops.spallm.correct_norm(y, x, name)
            else:
                norm.correct(y, x, self._quantization.step)

        opaque.make_known(
            vllm_config, name, lambda y, x: norm.correct(y, x, self._quantization.step)
        )
        module.register_forward_hook(correct)
        return norm

    def _remember(self, requests: Iterable[LoRARequest]) -> None:
        """What the numbers stand for that were used last; an adapter that comes again has a new
        one."""
        for request in requests:
            self._folders[request.lora_int_id] = request.lora_path
            self._folders.move_to_end(request.lora_int_id)
        while len(self._folders) > MOST_NUMBERS:
            self._folders.popitem(last=False)

    def _step(self, adapters: tuple[int, ...], folders: dict[int, str]) -> StepSlots:
        slots = {number: self._slot(folder) for number, folder in folders.items()}
        slots[_NO_ADAPTER] = BASE_SLOT
        return StepSlots.of([slots[adapter] for adapter in adapters], self._device)

    def _slot(self, folder: str) -> int:
        slot = self.resident.slot_of(folder)
        if slot is None:
            # Never the base's answer in its name.
            raise RuntimeError(f"the step uses the adapter {folder}, which is in no slot")
        return slot


class SlotWorkerExtension:
    """Methods for vLLM's workers, called through ``collective_rpc``.

    They say what is wrong instead of raising it: what a worker raises ends the engine.
    """

    model_runner: Any

    def spallm_keep(self, folder: str, let_go: list[str]) -> str:
        """See :meth:`ResidentAdapters.keep`."""
        return self._resident.keep(folder, let_go)

    def spallm_pin(self, folder: str) -> str:
        """See :meth:`ResidentAdapters.pin`; empty if it is pinned, or why it cannot be."""
        try:
            pinned = self._resident.pin(folder)
        except UserError as error:
            return str(error)
        return "" if pinned else "as many adapters are pinned as may be (--pinned-slots)"

    def spallm_unpin(self, folder: str) -> None:
        """See :meth:`ResidentAdapters.unpin`."""
        self._resident.unpin(folder)

    def spallm_time_swap(self, folder: str, rounds: int) -> float:
        """See :meth:`ResidentAdapters.time_swap`."""
        return self._resident.time_swap(folder, rounds)

    def spallm_residency(self) -> dict[str, Any]:
        """See :meth:`ResidentAdapters.facts`."""
        return self._resident.facts()

    @property
    def _resident(self) -> ResidentAdapters:
        manager: SlotManager = self.model_runner.lora_manager
        return manager.resident


def forget_adapter(state: Any, name: str) -> None:
    """Take an adapter that no request uses out of a table that vLLM only adds to.

    What was cached under its name stays; should it be asked for again, it is resolved again.

    Args:
        state: of vLLM's application.
        name: of the adapter.
    """
    models = state.openai_serving_models
    models.lora_requests.pop(name, None)
    models.lora_resolver_lock.pop(name, None)


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
