"""For a worker of vLLM's: what its compiled graphs have asked for, and what it holds."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

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

    def spallm_embedding_dtypes(self) -> list[str]:
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        return sorted({str(layer.weight.dtype) for layer in embeddings})
