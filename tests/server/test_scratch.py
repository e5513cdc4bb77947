"""What a killed process left on its way is removed; what another is working on stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from spallm_serve.server.scratch import scratch_folder

_HOLDS = """
import sys, time
from pathlib import Path
from spallm_serve.server.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as own:
    (own / "half").write_text("an upload")
    print(own, flush=True)
    time.sleep(60)
"""


def test_only_the_dead_are_cleaned_up_after(tmp_path: Path) -> None:
    parent = tmp_path / "uploads"
    command = [sys.executable, "-c", _HOLDS, str(parent)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    its = Path(other.stdout.readline().strip())
    with scratch_folder(parent) as own:
        assert (its / "half").is_file()
        assert own != its
    assert not own.exists()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (its / "half").is_file()
    (parent / "of another release").mkdir()
    with scratch_folder(parent) as own:
        assert list(parent.iterdir()) == [own]
