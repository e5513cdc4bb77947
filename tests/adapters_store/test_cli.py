"""``spallm-adapter`` as a user meets it: inspect, verify, merge, diff."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.adapters_store.cli import app
from spallm_serve.adapters_store.command import printable
from spallm_serve.models import load_model
from tests.adapters_store.made import saved

KINDS = ("lut", "smt", "lora")


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    message = result.output[result.output.index("error:") :].strip()
    assert "\n" not in message
    assert "Traceback" not in result.output
    return message


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapter(kind: str, sketched: Path, tmp_path: Path) -> Path:
    return saved(kind, sketched, tmp_path / "adapter")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from typer.testing import CliRunner;"
        "from spallm_serve.adapters_store.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd="/").returncode == 0
    for command in ("inspect", "verify", "merge", "diff", "from-lora"):
        assert "Example" in run(command, "--help")


def test_inspect(kind: str, adapter: Path) -> None:
    found = json.loads(run("inspect", adapter, "--json"))
    read = read_adapter(adapter)
    assert found["kind"] == read.config.peft_type
    assert found["base_digest"] == read.config.base_digest
    assert found["digest"] == adapter_digest(read)
    assert found["nbytes"] == read.nbytes == sum(each["nbytes"] for each in found["modules"])
    by_name = {each["name"]: each for each in found["modules"]}
    layers = {
        "lut": ("model.layers.1.mlp.up_proj", [58, 2, 8], "float16"),
        "smt": ("model.layers.1.self_attn.k_proj", [2, 8, 8], "float16"),
        "lora": ("model.layers.1.mlp.up_proj", [58, 36], "float32"),
    }
    name, shape, dtype = layers[kind]
    assert (by_name[name]["shape"], by_name[name]["dtype"]) == (shape, dtype)
    shown = run("inspect", adapter)
    assert found["digest"][:40] in shown
    assert all(each["name"] in shown for each in found["modules"])


def test_what_each_kind_says(sketched: Path, tmp_path: Path) -> None:
    found = {
        kind: json.loads(run("inspect", saved(kind, sketched, tmp_path / kind), "--json"))
        for kind in KINDS
    }
    lut, smt, lora = (found[kind] for kind in KINDS)
    height = sum(each["details"]["rows"] for each in lut["modules"] if each["details"])
    assert lut["summary"] == {"bits": "3", "groups": "2", "rows": height, "norms": 7}
    some = next(each for each in lut["modules"] if each["name"].endswith("0.self_attn.k_proj"))
    assert some["details"] == {"bits": 3, "groups": 2, "rows": 4, "all_rows": False}
    assert smt["summary"] == {"block_size": 8, "blocks": 2 * len(smt["modules"])}
    assert lora["summary"] == {"rank": 3, "alpha": 6.0, "scale": 2.0}


def test_verify(kind: str, adapter: Path, sketched: Path, dense: Path) -> None:
    alone = run("verify", adapter)
    assert alone.startswith("OK") and alone.strip().count("\n") == 0
    fits = run("verify", adapter, "--base", sketched)
    assert fits.startswith("OK") and fits.strip().count("\n") == 0
    if kind == "lora":
        assert "names no base" in fits
        run("verify", adapter, "--base", dense)
    else:
        message = refused("verify", adapter, "--base", dense)
        assert "made for the base" in message or "no such compressed layer" in message


def test_verify_finds_damage(adapter: Path, sketched: Path, tmp_path: Path) -> None:
    assert "no adapter here" in refused("verify", tmp_path)
    assert "no such directory" in refused("verify", adapter, "--base", tmp_path / "absent")
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "damaged" in refused("verify", copy)
    weights.unlink()
    assert "no such file" in refused("inspect", copy)


def test_merge(kind: str, adapter: Path, sketched: Path, tmp_path: Path) -> None:
    text = run("merge", adapter, "--base", sketched, "-o", tmp_path / "merged")
    assert "MiB" in text
    assert ("dense" in text) == (kind != "lut")
    load_model(tmp_path / "merged")
    again = refused("merge", adapter, "--base", sketched, "-o", tmp_path / "merged")
    assert "already holds a model" in again


def test_merge_refuses_another_base(sketched: Path, dense: Path, tmp_path: Path) -> None:
    adapter = saved("smt", sketched, tmp_path / "adapter")
    assert "made for the base" in refused(
        "merge", adapter, "--base", dense, "-o", tmp_path / "merged"
    )
    assert not (tmp_path / "merged").exists()


def test_diff(kind: str, adapter: Path, sketched: Path, tmp_path: Path) -> None:
    other = saved(kind, sketched, tmp_path / "other", seed=1)
    text = run("diff", adapter, other)
    assert "largest" in text
    assert "only in" not in text
    assert text.count("e-") + text.count("e+") > 10
    assert "0.000e+00" in run("diff", adapter, adapter)


def test_diff_of_two_kinds_and_two_bases(sketched: Path, dense: Path, tmp_path: Path) -> None:
    lut, smt = (saved(kind, sketched, tmp_path / kind) for kind in ("lut", "smt"))
    text = run("diff", lut, smt)
    assert "two kinds" in text
    assert "SPALLM_LUT" in text and "SPALLM_SMT" in text
    elsewhere = saved("smt", dense, tmp_path / "elsewhere")
    assert "two bases" in run("diff", smt, elsewhere)


def test_names_from_a_file_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n") == "a?[2Jb?"
    assert printable("[red]x[/]") == "\\[red]x\\[/]"
