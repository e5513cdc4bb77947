"""Workers that end with their server: of a killed one the engine, and its memory, would remain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

# Set by a server of ours: in other programs of vLLM's users nothing is ended.
MARK = "SPALLM_ENDS_WITH_PARENT"
_PAUSE_SECONDS = 1.0


def end_with_parent() -> None:
    """From now on this process is killed when the one that started it is gone.

    Only in a process that a server's has started, and once in it.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or os.environ.get(MARK) != "1":
        return
    if not any(thread.name == MARK for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(parent.pid,), name=MARK, daemon=True).start()


def _watch(parent: int) -> None:
    # Whoever inherits this process has another number.
    while os.getppid() == parent:
        time.sleep(_PAUSE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
