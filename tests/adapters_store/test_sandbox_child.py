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
import os, sys, time
from pathlib import Path
from spallm_serve.adapters_store import sandbox_child
from spallm_serve.adapters_store.failures import RejectedError
from spallm_serve.adapters_store.manifest import BaseManifest
from spallm_serve.adapters_store.sandbox import Job
from spallm_serve.adapters_store.validate import UploadLimits

waits = sys.argv[2] == "waits"

def check(*_):
    idle = os.sched_getscheduler(0) == os.SCHED_IDLE
    if idle and waits:
        time.sleep(60)
    raise RejectedError(f"idle {idle}, nice {os.nice(0)}")

sandbox_child.check_upload = check
here = Path(sys.argv[1])
manifest = BaseManifest(base_digest="0" * 64, linears={}, norms={})
job = Job(config_path=here, tensor_path=here, manifest=manifest, upload=UploadLimits(),
          memory_bytes=1 << 30, seconds=4)
print(sandbox_child._checked(job).decode())
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has what is left to give")
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
