"""vLLM's OpenAI server, told what it has to know to be ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from vllm import envs

from spallm_serve.errors import UserError
from spallm_serve.kernels.choice import integers_held
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE
from spallm_serve.precision import bfloat16_is_native
from spallm_serve.server import endpoints, orphans, vllm_compat
from spallm_serve.server.compiling import CannotCompileError, prepare_compiling
from spallm_serve.server.engine_flags import found_flag
from spallm_serve.server.quantization import PINNED_SLOTS_KEY
from spallm_serve.server.settings import ServerSettings

_PLUGINS = f"spallm,{endpoints.NAME}"
_BINDING = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
_BFLOAT16_HINT = (
    "this processor has no bfloat16 instructions: -- --dtype float32 is faster, and takes twice "
    "the memory for cached tokens and for linears that are not compressed"
)
_BYTES_HINT = (
    "tables are held as 8-bit integers, which this processor multiplies fastest: "
    f"{INTEGERS_VARIABLE}=16 rounds less, and is slower, most of all with many tenants at a time"
)
_TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Who uses one of these knows.
_ABOUT_COMPILING = ("--no-enforce-eager", "--compilation-config", "--optimization-level")
_SHORT_ABOUT_COMPILING = ("-O", "-cc")  # with what they say right behind
_MAY_NOT_COMPILE = "the model may not compile on this machine"
_UNCOMPILED = "the model runs uncompiled, about an eighth slower"
_COMPILES = (
    "compiling the model: a minute or more at the first start, less at others; with "
    "-- --enforce-eager the server starts at once and decodes about an eighth slower"
)


def engine_arguments(settings: ServerSettings) -> list[str]:
    """vLLM's flags for our settings."""
    flags = {
        "--model": settings.base,
        "--served-model-name": settings.name,
        "--host": settings.host,
        "--port": str(settings.port),
        "--max-loras": str(settings.slots),
        # Adapters in memory are counted in bytes, by us; vLLM counts them, and asks for as many.
        "--max-cpu-loras": str(settings.slots),
        "--shutdown-timeout": str(settings.drain_seconds),
        "--middleware": "spallm_serve.server.middleware.TenantGate",
        "--worker-extension-cls": "spallm_serve.server.vllm_compat.SlotWorkerExtension",
        "--prefix-caching-hash-algo": "sha256",
    }
    given = [part for pair in flags.items() for part in pair]
    additional = {
        vllm_compat.HOST_BYTES_KEY: settings.host_bytes,
        PINNED_SLOTS_KEY: settings.pinned_slots,
    }
    switches = ("--enable-lora", "--disable-fastapi-docs", "--disable-uvicorn-access-log")
    return [*given, *switches, "--additional-config", json.dumps(additional)]


def run(settings: ServerSettings, engine_flags: list[str]) -> None:
    """Serve until a signal ends it.

    Args:
        settings: ours.
        engine_flags: vLLM's own; they come after ours.
    """
    os.environ["VLLM_PLUGINS"] = _PLUGINS
    # The resolver needs it; vLLM's routes that load any path are not let through by the gate.
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    os.environ[orphans.MARK] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    vllm_compat.check_version()
    here = _for_this_machine(engine_flags)
    vllm_compat.serve([*engine_arguments(settings), *here, *engine_flags])


def _for_this_machine(engine_flags: list[str]) -> list[str]:
    """On a CPU the model is compiled where that can be done, and one process has all cores.

    Not if the environment binds threads to cores, or there are several memory nodes: only vLLM's
    own way of starting workers does that.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        # Nothing of ours has been compiled on one yet; --no-enforce-eager comes after this.
        return ["--enforce-eager"]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # The engine's one worker lives in the engine's process. vLLM's way is a process of its own, for
    # which the engine waits in a loop that takes a core; on two cores that is a third of the speed.
    if not any(name in os.environ for name in _BINDING) and _memory_nodes() < 2:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    console = Console(stderr=True, highlight=False)
    native = bfloat16_is_native(torch.device("cpu"))
    if found_flag(engine_flags, "--dtype") is None and not native:
        console.print(_BFLOAT16_HINT, soft_wrap=True)
    try:
        integers = integers_held("cpu", torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    if integers == torch.int8:
        console.print(_BYTES_HINT, soft_wrap=True)
    return _compiling(engine_flags, console)


def _compiling(engine_flags: list[str], console: Console) -> list[str]:
    """Flags for a model that is compiled, or is not where nothing compiles."""
    if found_flag(engine_flags, "--enforce-eager") is not None:
        return []
    short = any(flag.startswith(_SHORT_ABOUT_COMPILING) for flag in engine_flags)
    names = [flag.partition(".")[0] for flag in engine_flags]  # --compilation-config.mode=...
    told = short or any(found_flag(names, flag) for flag in _ABOUT_COMPILING)
    # What vLLM would keep of a compiled model cannot be read again on a CPU; what torch keeps can.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    # Headers that torch compiles it keeps in the folder below, whatever it is told.
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    try:
        folder = prepare_compiling(Path(envs.VLLM_CACHE_ROOT))
    except CannotCompileError as error:
        says = _MAY_NOT_COMPILE if told else _UNCOMPILED
        console.print(f"{says}: {error}", soft_wrap=True, markup=False)
        return [] if told else ["--enforce-eager"]
    # Torch's own folder has a name that anybody on the machine could have taken; importing it has
    # set the variable.
    if os.environ.get(_TORCH_CACHE, default_cache_dir()) == default_cache_dir():
        os.environ[_TORCH_CACHE] = str(folder)
    if not told:
        console.print(_COMPILES, soft_wrap=True)
    return []


def _memory_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
