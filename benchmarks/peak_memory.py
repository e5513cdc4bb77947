"""Peak memory of a function, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAM = """
import importlib, json, sys
from pathlib import Path
from spallm_serve.heap import peak_resident_bytes
module, name, arguments, found = sys.argv[1:]
getattr(importlib.import_module(module), name)(**json.loads(arguments))
Path(found).write_text(str(peak_resident_bytes()))
"""


def peak_rss(function: Callable[..., None], **arguments: Any) -> int:
    """Largest resident set, in bytes, of a fresh process that calls a function.

    Pages of mapped files count.

    Args:
        function: of a module's top level.
        arguments: that JSON can say.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.NamedTemporaryFile() as found:
        command = [sys.executable, "-c", _PROGRAM, function.__module__, function.__name__]
        finished = subprocess.run([*command, json.dumps(arguments), found.name], check=False)
        if finished.returncode:
            raise RuntimeError(f"{function.__name__}({arguments}) failed: {finished.returncode}")
        return int(Path(found.name).read_text())
