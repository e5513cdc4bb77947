"""Makes a base's manifest, once and without its weights in memory."""

from __future__ import annotations

from spallm_serve.adapters_store.base import StoredBase
from spallm_serve.adapters_store.manifest import BaseManifest, LinearShape
from spallm_serve.layers import SketchedLinear, is_linear, weight_shape
from spallm_serve.models import decoder_blocks, is_norm


def base_manifest(base: StoredBase) -> BaseManifest:
    """The manifest of a base.

    Its codes are read once, for the digest.

    Raises:
        UserError: the base is damaged.
    """
    model = base.skeleton()
    prefix, blocks = decoder_blocks(model)
    in_block = {name for name, module in blocks.named_modules(prefix=prefix) if is_linear(module)}
    linears: dict[str, LinearShape] = {}
    norms: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            rows, columns = weight_shape(module)
            bits = groups = None
            if isinstance(module, SketchedLinear):
                groups = module.tables.shape[1]
                bits = module.tables.shape[2].bit_length() - 1
            linears[name] = LinearShape(
                rows=rows, columns=columns, bits=bits, groups=groups, in_block=name in in_block
            )
        elif is_norm(module):
            for leaf, parameter in module.named_parameters(recurse=False):
                norms[f"{name}.{leaf}"] = tuple(parameter.shape)
    return BaseManifest(base_digest=base.digest(), linears=linears, norms=norms)
