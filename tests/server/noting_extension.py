"""For a worker of vLLM's: which of our layers its compiled graphs have asked for."""

from __future__ import annotations

from typing import Any

from spallm_serve.server import opaque

_asked: set[str] = set()
_layer = opaque._layer


def _noted(name: str) -> Any:
    _asked.add(name)
    return _layer(name)


opaque._layer = _noted


class NotingExtension:
    """To be named as ``worker_extension_cls``; importing it makes the worker take note."""

    def spallm_layers_asked(self) -> list[str]:
        return sorted(_asked)
