"""Embeddings and heads that were left as they are, kept in the dtype that their checkpoint has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from spallm_serve.kernels.choice import keeps_bfloat16
from spallm_serve.kernels.cpu.dense import dense_linear

# Their models make other tensors in the dtype of the embedding's.
_READING_THE_DTYPE = ("gemma3n",)


class KeptEmbedding(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """In bfloat16 where all else is in float32: half of what a head's product reads, and holds."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As vLLM's, in bfloat16."""
        layer.spallm_dtype = params_dtype
        load = extra_weight_attrs["weight_loader"]

        def load_unrounded(weight: Any, loaded: Tensor) -> None:
            if loaded.dtype != torch.bfloat16:  # of a checkpoint that says something else
                weight.data = torch.empty_like(weight.data, dtype=params_dtype)
            load(weight, loaded)

        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size,
            torch.bfloat16, **extra_weight_attrs | {"weight_loader": load_unrounded},
        )  # fmt: skip

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: vLLM would get it ready for its own product."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, ``x [..., width] -> [..., vocabulary]``."""
        if layer.weight.dtype == x.dtype:
            return F.linear(x, layer.weight, bias)
        y = dense_linear(x.reshape(-1, x.shape[-1]), layer.weight)
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """``ids [...] -> [..., width]``."""
        return F.embedding(input_, layer.weight).to(layer.spallm_dtype)


def kept_embedding(vllm_config: VllmConfig, layer: Any) -> KeptEmbedding | None:
    """How an embedding or a head that was left as it is is held; None leaves it to vLLM.

    Args:
        vllm_config: of the model.
        layer: an embedding or a head of vLLM's.
    """
    # Others, which scale what they find, and some models look at the weight's dtype.
    if type(layer) not in (VocabParallelEmbedding, ParallelLMHead):
        return None
    model = vllm_config.model_config
    if model.hf_text_config.model_type.startswith(_READING_THE_DTYPE):
        return None
    configs = model.hf_text_config, model.hf_config
    stored = next((found for each in configs if (found := getattr(each, "dtype", None))), None)
    device = vllm_config.device_config.device_type
    if isinstance(stored, torch.dtype) and keeps_bfloat16(device, model.dtype, stored):
        return KeptEmbedding()
    return None
