"""A run that is stopped at any moment and started again ends in the same bytes."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

import spallm_serve.compressor.publish as publish_module
import spallm_serve.compressor.refine as refine_module
import spallm_serve.compressor.run_directory as run_directory
from spallm_serve.compressor.cli import app
from spallm_serve.compressor.observer import SilentObserver
from spallm_serve.compressor.pipeline import compress
from spallm_serve.compressor.record import CompressionRecord
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError
from tests.tiny_models import save_tiny

QUICK = {"bits": 3, "samples": 2, "seqlen": 8, "estimator_rank": 2}
RUNS: dict[str, dict[str, object]] = {
    "plain": {},
    "allocated": {"target_bits": 5.0},
    # The state of the distillation is saved once, after ten steps.
    "refined": {"refine_steps": 12, "embeddings": 4},
}
OPTIONS = ["--bits", "3", "--samples", "2", "--seqlen", "8", "--estimator-rank", "2"]


class Interrupted(BaseException):
    """Like a keyboard interrupt: nothing may catch it and go on."""


class Countdown:
    """An observer that counts its calls and raises at the one it was told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self.stop_at = 0, stop_at

    def _call(self, *arguments: object) -> None:
        self.calls += 1
        if self.calls == self.stop_at:
            raise Interrupted

    stage = step = layer = refined = resumed = _call


def quick_report(record: CompressionRecord, path: Path) -> None:
    path.write_text(record.model_dump_json())


@pytest.fixture(scope="module", autouse=True)
def quicker() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine_module, "STEP_TOKENS", 16)
        patch.setattr(publish_module, "write_report", quick_report)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


def run(source: Path, output: Path, name: str, observer: object = None) -> None:
    settings = CompressSettings.model_validate(QUICK | RUNS[name])
    compress(str(source), output, settings, observer or SilentObserver())  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """The files of a run that was left alone, and how many calls its observer saw."""
    known: dict[str, tuple[dict[str, bytes], int]] = {}

    def wanted(name: str) -> tuple[dict[str, bytes], int]:
        if name not in known:
            output, observer = tmp_path_factory.mktemp(name) / "out", Countdown()
            run(source, output, name, observer)
            known[name] = contents(output), observer.calls
        return known[name]

    return wanted


@pytest.mark.parametrize(("name", "moments"), [("plain", 3), ("allocated", 2), ("refined", 5)])
def test_interrupted_once(
    name: str,
    moments: int,
    source: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    files, calls = undisturbed(name)
    for moment in [*random.Random(0).sample(range(1, calls), moments - 1), calls]:
        output = tmp_path / str(moment)
        with pytest.raises(Interrupted):
            run(source, output, name, Countdown(moment))
        assert not (output / "config.json").exists()
        run(source, output, name)
        assert contents(output) == files, f"interrupted at call {moment} of {calls}"


def test_interrupted_again_and_again(
    source: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    files, calls = undisturbed("refined")
    moments = random.Random(1)
    for _ in range(8):
        with pytest.raises(Interrupted):
            run(source, tmp_path / "out", "refined", Countdown(moments.randint(1, calls // 4)))
    run(source, tmp_path / "out", "refined")
    assert contents(tmp_path / "out") == files


def test_interrupted_at_every_move_of_a_file(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    """Before each rename into place: of saved state, and of finished files into the output."""
    files, _ = undisturbed("plain")
    output = tmp_path / "out"
    real, seen = Path.replace, set()

    def interrupting(self: Path, target: Path) -> Path:
        if target.name not in seen:
            seen.add(target.name)
            raise Interrupted
        return real(self, target)

    monkeypatch.setattr(Path, "replace", interrupting)
    for _ in range(100):
        try:
            run(source, output, "plain")
            break
        except Interrupted:
            assert not (output / "config.json").exists()
    assert contents(output) == files
    assert seen >= files.keys()
    assert {"fingerprint", "tokens.safetensors", "block-00002.safetensors"} <= seen


@pytest.mark.parametrize("before", [True, False])
def test_interrupted_around_writing_the_shards(
    before: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    real = publish_module.write_shards

    def interrupting(*arguments: object) -> int:
        if not before:
            real(*arguments)  # type: ignore[arg-type]
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(publish_module, "write_shards", interrupting)
        run(source, tmp_path / "out", "plain")
    run(source, tmp_path / "out", "plain")
    assert contents(tmp_path / "out") == undisturbed("plain")[0]


def sweep_halfway(
    source: Path, output: Path, keep: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that was stopped while it removed its state; ``keep`` says what is left."""
    real = shutil.rmtree

    def interrupting(path: Path, **options: bool) -> None:
        if path.name != run_directory.UNFINISHED:
            real(path, **options)
            return
        for entry in path.iterdir():
            if not keep(entry.name):
                real(entry) if entry.is_dir() else entry.unlink()
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run_directory.shutil, "rmtree", interrupting)
        run(source, output, "plain")


@pytest.mark.parametrize("left", ["*", "fingerprint", "tokens.safetensors", ""])
def test_interrupted_while_sweeping(
    left: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    output = tmp_path / "out"
    sweep_halfway(source, output, lambda name: left in ("*", name), monkeypatch)
    run(source, output, "plain")
    assert contents(output) == undisturbed("plain")[0]


@pytest.mark.parametrize("left", ["*", "tokens.safetensors", ""])
def test_other_settings_never_pass_for_a_run_that_was_not_swept(
    left: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    output = tmp_path / "out"
    sweep_halfway(source, output, lambda name: left in ("*", name), monkeypatch)
    with pytest.raises(UserError):
        run(source, output, "allocated")
    files = undisturbed("plain")[0]
    assert {name: (output / name).read_bytes() for name in files} == files


def test_state_without_its_fingerprint_is_not_taken_up(
    source: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    """Left by a kill while the state of another run was removed."""
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(source, output, "allocated", Countdown(undisturbed("allocated")[1]))
    (output / run_directory.UNFINISHED / "fingerprint").unlink()
    run(source, output, "plain")
    assert contents(output) == undisturbed("plain")[0]


def test_other_settings_are_refused_and_touch_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(source, output, "plain", Countdown(20))
    before = contents(output)
    assert any(name.endswith(".safetensors") for name in before)
    for name in ("refined", "allocated"):
        with pytest.raises(UserError, match="other settings"):
            run(source, output, name)
    assert contents(output) == before


@pytest.mark.parametrize("option", ["--resume", "--no-resume"])
def test_second_run_at_the_same_time_is_refused(
    option: str,
    source: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(source, output, "plain", Countdown(20))
    before = contents(output)
    with FileLock(output / run_directory.UNFINISHED / "lock"):
        result = CliRunner().invoke(app, [str(source), "-o", str(output), *OPTIONS, option])
        assert contents(output) == before
    assert result.exit_code == 2
    assert "another run is writing" in result.output
    run(source, output, "plain")
    assert contents(output) == undisturbed("plain")[0]


def test_no_resume_starts_afresh_also_where_files_were_being_moved(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    output = tmp_path / "out"
    real = Path.replace

    def interrupting(self: Path, target: Path) -> Path:
        if target == output / "config.json":
            raise Interrupted
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "replace", interrupting)
        run(source, output, "plain")
    assert (output / "model.safetensors").exists()
    result = CliRunner().invoke(app, [str(source), "-o", str(output), *OPTIONS, "--no-resume"])
    assert result.exit_code == 0, result.output
    assert contents(output) == undisturbed("plain")[0]


# One process imports everything and forks a fresh one for each try: importing takes far longer
# than the run.
KILLER = """
import multiprocessing, random, sys, time
from pathlib import Path
import spallm_serve.compressor.command
from spallm_serve.compressor.cli import app

source, scratch, *options = sys.argv[1:]
fork = multiprocessing.get_context("fork")

def attempt(output, seconds):
    arguments = [source, "-o", output, *options]
    child = fork.Process(target=app, args=(arguments,))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode

started = time.monotonic()
assert attempt(scratch + "/undisturbed", None) == 0
duration = time.monotonic() - started
moments = random.Random(2)
killed = Path(scratch, "killed")
for _ in range(3):
    attempt(str(killed), moments.uniform(0.1, 0.6) * duration)
if (killed / ".unfinished").exists() or not (killed / "config.json").exists():
    assert attempt(str(killed), None) == 0
"""


def test_killed_by_the_system(source: Path, tmp_path: Path) -> None:
    arguments = [str(source), str(tmp_path), *OPTIONS, "--embeddings", "4"]
    result = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    wanted = contents(tmp_path / "undisturbed")
    assert "spallm_report.html" in wanted
    assert contents(tmp_path / "killed") == wanted
