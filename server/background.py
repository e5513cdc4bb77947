"""Threads that work beside those that answer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading

import torch

# How much less of a processor such a thread has than one that answers: a tenth, where both want it.
_NICER = 10
_LEAST = 19


def step_back() -> None:
    """Have the current thread multiply alone and with what the processors have left.

    A step's threads wait for the slowest of them: what takes one of the processors from them delays
    all streams. Without this a thread that reads an adapter takes two, as torch shares out what it
    does, and both spin for a while after each tensor.
    """
    # Once for each thread torch sets what it may take, when it is first asked; then this counts.
    torch.get_num_threads()
    # Another system's libraries, another runtime, or none that everybody sees.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).omp_set_num_threads(1)
    if sys.platform != "linux":  # elsewhere a thread has no priority of its own
        return
    own = threading.get_native_id()
    with contextlib.suppress(OSError):  # where this may not be asked for, it is not vital
        nice = os.getpriority(os.PRIO_PROCESS, own) + _NICER
        os.setpriority(os.PRIO_PROCESS, own, min(nice, _LEAST))
