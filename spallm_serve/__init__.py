"""Thousands of fine-tuned models served from one compressed base.

Importing this package teaches transformers to read compressed checkpoints:
``AutoModelForCausalLM.from_pretrained(DIR)`` then works as for any other model.
"""

from wrapt import register_post_import_hook


def _register_quantizer(_module: object) -> None:
    import spallm_serve.hf_quantizer  # noqa: F401  (importing it registers)


# Registering needs transformers and torch. Waiting until somebody imports them keeps this import,
# and so the --help of every command, fast.
register_post_import_hook(_register_quantizer, "transformers.modeling_utils")
