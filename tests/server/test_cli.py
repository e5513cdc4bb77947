"""``spallm-serve``: what it refuses before anything is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spallm_serve.server.cli import app
from spallm_serve.server.engine_flags import found_flag
from tests.tiny_models import save_tiny, save_tokenizer


def refused(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(part) for part in arguments])
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    return " ".join(found.output.split())


def test_a_base_that_is_not_compressed(tmp_path: Path) -> None:
    dense = save_tokenizer(save_tiny("llama", tmp_path / "dense"))
    said = refused(dense, "--store", tmp_path / "store")
    assert "spallm-compress" in said


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", "--store", tmp_path / "store")


@pytest.mark.parametrize(
    "flag",
    [
        "--middleware=x.Y",
        "--api-key",
        "--lora-modules",
        "--chat-template=x",
        "--trust_remote_code",
        "--enable-prompt-embeds",
        "--middlew=x.Y",
        "--data-parallel-size=2",
        "--data_parallel_si",
        "-dp",
    ],
)
def test_flags_of_the_engine_that_would_open_the_gate(flag: str, tmp_path: Path) -> None:
    said = refused("base", "--store", tmp_path / "store", "--", flag)
    assert flag.partition("=")[0].replace("_", "-") in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--max-model-len", "64", "--dtype", "half"], "--dtype"),
        (["--dt=half"], "--dt"),
        (["--dtype-of-else", "--", "-d", "dtype"], None),
        ([], None),
    ],
)
def test_flags_are_found_as_the_engine_reads_them(flags: list[str], found: str | None) -> None:
    assert found_flag(flags, "--dtype") == found


def test_a_front_end_without_middleware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "no authentication" in refused("base", "--store", tmp_path / "store")


def test_settings_that_are_out_of_range() -> None:
    assert "port" in refused("base", "--port", 70000)
    assert "base" in refused()


def test_help_is_there_at_once_without_the_engine() -> None:
    program = (
        "import sys; from spallm_serve.server.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'vllm', 'transformers', 'sqlalchemy'} & sys.modules.keys()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"spallm-serve ./base-spallm-4bit" in found.stdout
