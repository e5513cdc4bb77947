"""vLLM's quantization method ``spallm``: compressed layers with tables for each slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from spallm_serve.checkpoint import (
    ESTIMATOR_A,
    ESTIMATOR_B,
    QUANT_METHOD,
    SketchConfig,
    parse_sketch_config,
)
from spallm_serve.kernels.packing import unpack_codes
from spallm_serve.kernels.reference import dequantize
from spallm_serve.server import opaque
from spallm_serve.server.host_adapter import Place
from spallm_serve.server.kept_embedding import kept_embedding
from spallm_serve.server.layer_loader import LayerLoader
from spallm_serve.server.sharding import Shard
from spallm_serve.server.slotted import Sketched, SlottedLinear, StepSlots

# Layers are typed Any: they are vLLM's, and carry what it and we put on them.

# Compute capability; the Triton programs are compiled for Ampere and later.
_AMPERE = 80
# Where the workers, which are processes of their own, find how many adapters may be pinned.
PINNED_SLOTS_KEY = "spallm_pinned_slots"


def slot_count(vllm_config: Any) -> int:
    """Sets of tables beside the base's: those that a step may mix, and those for pinned ones."""
    lora = vllm_config.lora_config
    if lora is None:
        return 0
    return int(lora.max_loras) + int(vllm_config.additional_config.get(PINNED_SLOTS_KEY, 0))


class SpallmQuantization(QuantizationConfig):  # type: ignore[misc]
    """What a checkpoint of ours says, and what its layers have in common.

    Args:
        sketch: its ``quantization_config``.

    Attributes:
        step: which slot each token of the current step uses.
        sampled: the same for the tokens whose logits are computed.
    """

    def __init__(self, sketch: SketchConfig) -> None:
        super().__init__()
        self.sketch = sketch
        self.step = StepSlots()
        self.sampled = StepSlots()

    def get_name(self) -> str:
        """``spallm``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of GPUs."""
        return _AMPERE

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpallmQuantization:
        """From ``quantization_config``.

        Raises:
            UserError: see :func:`~spallm_serve.checkpoint.parse_sketch_config`.
        """
        return cls(parse_sketch_config(config, "quantization_config"))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is multiplied; None leaves it to vLLM."""
        names = self._parts(prefix)
        left = all(self.leaves(name) for name in names)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if left else SpallmLinear(self, names)
        if isinstance(layer, ParallelLMHead):
            if not left:
                return SpallmHead(self, names)
            return kept_embedding(get_current_vllm_config(), layer)
        # Some models, Llama among them, do not say where their token embedding is.
        embeddings = self.sketch.embeddings
        if isinstance(layer, VocabParallelEmbedding):
            if embeddings and (prefix in embeddings or not prefix):
                return SpallmEmbedding()
            return kept_embedding(get_current_vllm_config(), layer)
        return None

    def leaves(self, name: str) -> bool:
        """Whether a linear was left as it is."""
        return name in self.sketch.skipped

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """vLLM reads every safetensors file of a checkpoint; estimators are for training."""
        return WeightsMapper(orig_to_new_suffix={ESTIMATOR_A: None, ESTIMATOR_B: None})

    def _parts(self, prefix: str) -> list[str]:
        """The linears in the checkpoint that a layer of vLLM's stands for."""
        parent, dot, leaf = prefix.rpartition(".")
        return [parent + dot + part for part in self.packed_modules_mapping.get(leaf, [leaf])]


class SpallmLinear(LinearMethodBase):  # type: ignore[misc]
    """Multiplies by codes that are held once and the tables of each token's slot.

    Args:
        config: of the model.
        names: the linears in the checkpoint, in the order of their outputs.
    """

    def __init__(self, config: SpallmQuantization, names: list[str]) -> None:
        self._config = config
        self._names = names

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
        """Prepare to be loaded: bits, and so shapes, may differ from linear to linear."""
        layer.spallm_dtype = params_dtype
        loader = LayerLoader(layer, input_size_per_partition, output_partition_sizes, input_size)
        loader.left = {n for n, name in enumerate(self._names) if self._config.leaves(name)}
        loader.attach()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Merge what was loaded; see :class:`SlottedLinear`.

        Linears that were left as they are have no place that an adapter could be put in.
        """
        loader: LayerLoader = layer.spallm_loader
        slots = slot_count(get_current_vllm_config())
        layer.spallm = SlottedLinear.of(loader.linears(self._names), 1 + slots, layer.spallm_dtype)
        layer.spallm_places = {
            name: Place(layer.prefix, number, loader.shards[number], loader.rows[number])
            for number, name in enumerate(self._names)
            if number not in loader.left
        }
        loader.detach()
        opaque.make_known(
            get_current_vllm_config(), layer.prefix, lambda x, bias: self._product(layer, x, bias)
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        if torch.compiler.is_compiling():
            rows = layer.spallm.rows
            y: Tensor = torch.ops.spallm.slotted_linear(x, bias, layer.prefix, rows)
            return y
        return self._product(layer, x, bias)

    def _product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        slotted: SlottedLinear = layer.spallm
        return slotted(x, bias, self._step)

    @property
    def _step(self) -> StepSlots:
        return self._config.step


class SpallmHead(SpallmLinear):
    """An output head with codes of its own, or one that reads those of the embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head is the embedding from now on."""
        layer.spallm_loader.detach()
        return embed_tokens

    @property
    def _step(self) -> StepSlots:
        return self._config.sampled


class SpallmEmbedding(QuantizeMethodBase):  # type: ignore[misc]
    """A token embedding from codes and tables; as a tied head it gives logits, too.

    It has the base's tables in every slot.
    """

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
        """Prepare to be loaded."""
        layer.spallm_dtype = params_dtype
        indices = layer.shard_indices
        first = indices.org_vocab_start_index
        rows = indices.org_vocab_end_index - first
        loader = LayerLoader(layer, input_size, [rows], input_size)
        loader.shards = [Shard(first, rows, 0, input_size, input_size)]
        loader.attach()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the planes: single rows are looked up in them."""
        layer.spallm_rows = layer.spallm_loader.sketch(layer.prefix)
        layer.spallm_head = None
        layer.spallm_loader.detach()
        config = get_current_vllm_config()
        # Some models do not tell their embedding its name.
        layer.spallm_name = layer.prefix or opaque.unused_name(config, "embedding")
        opaque.make_known(config, layer.spallm_name, lambda ids: self._rows(layer, ids))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """``ids [...] -> [..., width]``."""
        if torch.compiler.is_compiling():
            width, dtype = layer.spallm_rows.columns, layer.spallm_dtype
            y: Tensor = torch.ops.spallm.slotted_embedding(input_, layer.spallm_name, width, dtype)
            return y
        return self._rows(layer, input_)

    def _rows(self, layer: Any, input_: Tensor) -> Tensor:
        whole: Sketched = layer.spallm_rows
        ids = input_.reshape(-1)
        codes = unpack_codes(whole.planes[:, ids], whole.columns)
        rows = dequantize(codes, whole.tables[ids].to(layer.spallm_dtype))
        return rows.view(*input_.shape, whole.columns)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of a tied head, ``x [tokens, width] -> [tokens, vocabulary]``."""
        if layer.spallm_head is None:  # only a tied head needs the codes in a kernel's order, too
            layer.spallm_head = SlottedLinear.of([layer.spallm_rows], 1, layer.spallm_dtype)
        slotted: SlottedLinear = layer.spallm_head
        return slotted(x, bias, StepSlots())
