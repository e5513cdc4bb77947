"""What a check has of the processors: what they have left, and a share if that is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process that checks as the real one does, but for the check: what it is told to do where nothing
# is left for it, and else to refuse with the name of what it runs as.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from spallm_serve.adapters_store import sandbox_child
from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.sandbox import Job
from spallm_serve.adapters_store.validate import UploadLimits

waits = sys.argv[2] == "waits"
if not waits:  # other tests may leave it little
    sandbox_child._IDLE_SECONDS = 100

def check(*_):
    idle = os.sched_getscheduler(0) == os.SCHED_IDLE
    if idle and waits:
        signal.pause()  # until it is killed
    raise RejectedError(f"idle {idle}, nice {os.nice(0)}")

sandbox_child.check_upload = check
here = Path(sys.argv[1])
manifest = BaseManifest(base_digest="0" * 64, linears={}, norms={})
job = Job(config_path=here, tensor_path=here, manifest=manifest, upload=UploadLimits(),
          memory_bytes=1 << 30, seconds=4 if waits else 200)
print(sandbox_child._checked(job).decode())
"""


def may_be_idle() -> bool:
    """Whether the system lets a process have only what is left."""
    asks = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    return subprocess.run([sys.executable, "-c", asks], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_be_idle(), reason="processes here cannot be idle")
@pytest.mark.parametrize("waits", [False, True])
def test_a_check_is_idle_first_and_nice_where_it_came_to_nothing(
    waits: bool, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    own = os.nice(0)
    command = [sys.executable, "-c", PROGRAM, str(file), "waits" if waits else "works"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    nice = min(own + 10, 19) if waits else own
    assert json.loads(ran.stdout)["rejected"] == f"idle {not waits}, nice {nice}"
