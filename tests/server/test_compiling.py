"""Whether this machine compiles, and where what it makes is kept."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from spallm_serve.server import compiling
from spallm_serve.server.compiling import CannotCompileError, prepare_compiling

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no g++ on this machine"
)


@pytest.fixture(autouse=True)
def default_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)


@needs_compiler
def test_a_folder_is_its_owners_alone_and_left_clean(tmp_path: Path) -> None:
    folder = prepare_compiling(tmp_path)
    assert tmp_path in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    folder.chmod(0o777)
    assert prepare_compiling(tmp_path) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_compiler
def test_another_processor_has_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepare_compiling(tmp_path)
    read = Path.read_text

    def elsewhere(path: Path, *arguments: object) -> str:
        if str(path) == "/proc/cpuinfo":
            return "processor : 0\nmodel name : Other\nflags : fpu\n\nprocessor : 1\n"
        return read(path)

    monkeypatch.setattr(Path, "read_text", elsewhere)
    assert prepare_compiling(tmp_path) != here


@needs_compiler
def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_compiling(tmp_path)
    somebody = os.getuid() + 1
    monkeypatch.setattr(compiling.os, "getuid", lambda: somebody)
    with pytest.raises(CannotCompileError, match="belongs to user"):
        prepare_compiling(tmp_path)


@needs_compiler
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = prepare_compiling(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    for link in (folder, folder.parent):
        shutil.rmtree(link)
        link.symlink_to(elsewhere)
        with pytest.raises(CannotCompileError, match="is a link"):
            prepare_compiling(tmp_path / "cache")
        link.unlink()
        link.mkdir()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755


def test_without_a_folder_nothing_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "spallm_compiled").write_text("a file")
    with pytest.raises(CannotCompileError, match="cannot be used"):
        prepare_compiling(tmp_path)


@pytest.mark.parametrize(
    ("compiler", "says"),
    [("/no/such/g++", "does not run"), ("ccache g++", "does not run"), ("false", "false:")],
)
def test_a_compiler_that_does_not_work_is_named(
    compiler: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CannotCompileError, match=says):
        prepare_compiling(tmp_path)


@needs_compiler
def test_without_pythons_headers_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CannotCompileError, match=r"Python\.h"):
        prepare_compiling(tmp_path)
