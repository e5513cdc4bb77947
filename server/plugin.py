"""The entry point ``vllm.general_plugins``: vLLM calls it in every process it starts."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know models of ours; calling it again changes nothing.

    Nothing of vLLM is imported before it is called.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spallm_serve.checkpoint import QUANT_METHOD
    from spallm_serve.server import orphans, vllm_compat
    from spallm_serve.server.quantization import SpallmQuantization

    orphans.end_with_parent()
    vllm_compat.install()
    register_quantization_config(QUANT_METHOD)(SpallmQuantization)
