"""Threads that leave the processors to those that answer."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spallm_serve.kernels.cpu.library import library
from spallm_serve.kernels.native import NativeLibraryError
from spallm_serve.server import background
from spallm_serve.server.background import step_back


def _facts() -> tuple[int, int]:
    torch.zeros(1 << 20).isfinite().all()
    return torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_thread_steps_back_and_others_do_not() -> None:
    try:
        library()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    wanted = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1, initializer=step_back) as behind:
            assert behind.submit(_facts).result() == (1, min(_facts()[1] + 10, 19))
        with ThreadPoolExecutor(1) as beside:
            assert beside.submit(_facts).result()[0] == 2
        assert _facts()[0] == 2
    finally:
        torch.set_num_threads(wanted)


def test_a_thread_that_may_not_step_back_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or what it belongs to would take nothing more."""

    def refuse(*arguments: object) -> None:
        raise PermissionError("as a container may")

    monkeypatch.setattr(background.os, "setpriority", refuse)
    monkeypatch.setattr(background.ctypes, "CDLL", refuse)
    with ThreadPoolExecutor(1, initializer=step_back) as behind:
        assert behind.submit(int, "7").result() == 7
