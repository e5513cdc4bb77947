"""vLLM's OpenAI server, told what it has to know to be ours."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from vllm import envs

from spallm_serve.precision import bfloat16_is_native
from spallm_serve.server import endpoints, orphans, vllm_compat
from spallm_serve.server.engine_flags import found_flag
from spallm_serve.server.quantization import PINNED_SLOTS_KEY
from spallm_serve.server.settings import ServerSettings

_PLUGINS = f"spallm,{endpoints.NAME}"
_BINDING = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
_BFLOAT16_HINT = (
    "this processor has no bfloat16 instructions: -- --dtype float32 is faster, and takes twice "
    "the memory for cached tokens and for weights that are not compressed"
)
_NO_COMPILER = (
    "the model runs uncompiled, about a fifth slower: there is no C++ compiler (g++, or what CXX "
    "says), or no Python headers for it"
)
_COMPILES = (
    "compiling the model: a minute or more at the first start, less at others; with "
    "-- --enforce-eager the server starts at once and decodes about a fifth slower"
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
    """On a CPU one process has all cores, and the model is compiled where that can be done.

    Unless the environment binds threads to cores, or there are several memory nodes: only vLLM's
    own way of starting workers does that.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # The engine's one worker lives in the engine's process. vLLM's way is a process of its own, for
    # which the engine waits in a loop that takes a core; on two cores that is a third of the speed.
    if not any(name in os.environ for name in _BINDING) and _memory_nodes() < 2:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    console = Console(stderr=True, highlight=False)
    if found_flag(engine_flags, "--dtype") is None and not bfloat16_is_native(torch.device("cpu")):
        console.print(_BFLOAT16_HINT, soft_wrap=True)
    return _compiling(engine_flags, console)


def _compiling(engine_flags: list[str], console: Console) -> list[str]:
    """Flags for a model that is compiled, or is not where nothing compiles."""
    if found_flag(engine_flags, "--enforce-eager") is not None:
        return []
    if not _can_compile():
        console.print(_NO_COMPILER, soft_wrap=True)
        return ["--enforce-eager"]
    # What vLLM would keep of a compiled model cannot be read again on a CPU; what torch keeps can.
    # Its own folder for that is one that anybody on the machine could have made.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    kept = Path(envs.VLLM_CACHE_ROOT) / "spallm_compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    console.print(_COMPILES, soft_wrap=True)
    return []


def _can_compile() -> bool:
    """Whether there is what the compiler runs: of C++, and the headers of Python."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _memory_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
