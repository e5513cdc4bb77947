"""vLLM's quantization method ``spallm``: compressed layers with tables for each slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
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
    CODES,
    ESTIMATOR_A,
    ESTIMATOR_B,
    QUANT_METHOD,
    TABLES,
    WEIGHT,
    SketchConfig,
    parse_sketch_config,
)
from spallm_serve.errors import UserError
from spallm_serve.kernels.packing import unpack_codes
from spallm_serve.kernels.reference import dequantize
from spallm_serve.server.host_adapter import Place
from spallm_serve.server.sharding import Shard
from spallm_serve.server.slotted import Dense, Linear, Sketched, SlottedLinear, StepSlots

# Layers are typed Any: they are vLLM's, and carry what it and we put on them.
_QKV = {"q": 0, "k": 1, "v": 2}
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
            return None if left else SpallmHead(self, names)
        # Some models, Llama among them, do not say where their token embedding is.
        embeddings = self.sketch.embeddings
        if isinstance(layer, VocabParallelEmbedding) and (prefix in embeddings or not prefix):
            return SpallmEmbedding() if embeddings else None
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
        loader = _Loader(layer, input_size_per_partition, output_partition_sizes, input_size)
        loader.left = {n for n, name in enumerate(self._names) if self._config.leaves(name)}
        loader.attach()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Merge what was loaded; see :class:`SlottedLinear`.

        Linears that were left as they are have no place that an adapter could be put in.
        """
        loader: _Loader = layer.spallm_loader
        slots = slot_count(get_current_vllm_config())
        layer.spallm = SlottedLinear.of(loader.linears(self._names), 1 + slots, layer.spallm_dtype)
        layer.spallm_places = {
            name: Place(layer.prefix, number, loader.shards[number], loader.rows[number])
            for number, name in enumerate(self._names)
            if number not in loader.left
        }
        loader.detach()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        slotted: SlottedLinear = layer.spallm
        return slotted(x, bias, self._config.step)


class SpallmHead(SpallmLinear):
    """An output head with codes of its own, or one that reads those of the embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head is the embedding from now on."""
        layer.spallm_loader.detach()
        return embed_tokens

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [tokens, width] -> [tokens, vocabulary]``."""
        slotted: SlottedLinear = layer.spallm
        return slotted(x, bias, self._config.sampled)


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
        loader = _Loader(layer, input_size, [rows], input_size)
        loader.shards = [Shard(first, rows, 0, input_size, input_size)]
        loader.attach()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the planes: single rows are looked up in them."""
        layer.spallm_rows = layer.spallm_loader.sketch(layer.prefix)
        layer.spallm_head = None
        layer.spallm_loader.detach()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """``ids [...] -> [..., width]``."""
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


class _Loader:
    """Takes codes and tables, or whole weights, as they come, each the worker's share, until the
    layer is made.

    Args:
        layer: of vLLM's.
        columns: inputs of the worker.
        rows: outputs of the worker, of each linear.
        all_columns: inputs.

    Attributes:
        left: numbers of the linears that were left as they are.
        rows: outputs of each whole linear that was loaded.
        shards: what the worker takes of each.
    """

    def __init__(self, layer: Any, columns: int, rows: list[int], all_columns: int) -> None:
        self._layer = layer
        self._loaded: dict[tuple[str, int], Tensor] = {}
        self.left: set[int] = set()
        self.rows: dict[int, int] = {}
        self.shards = [
            Shard(_first_row(layer, number, own), own, _first_column(layer, columns), columns,
                  all_columns)
            for number, own in enumerate(rows)
        ]  # fmt: skip

    def attach(self) -> None:
        """Give the layer parameters that take what is loaded."""
        for ending in self._endings():
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._taking(ending)  # type: ignore[attr-defined]
            self._layer.register_parameter(ending.removeprefix("."), parameter)
        self._layer.spallm_loader = self

    def detach(self) -> None:
        """Nothing more is loaded."""
        for ending in self._endings():
            delattr(self._layer, ending.removeprefix("."))
        self._loaded.clear()

    def linears(self, names: list[str]) -> list[Linear]:
        """What was loaded.

        Raises:
            UserError: something was not.
        """
        return [self._linear(number, name) for number, name in enumerate(names)]

    def sketch(self, name: str) -> Sketched:
        """What was loaded for a layer that is one compressed linear.

        Raises:
            UserError: something was not.
        """
        planes, tables = (self._taken(ending, 0, name) for ending in (CODES, TABLES))
        return Sketched(planes, tables, self.shards[0].columns)

    def _linear(self, number: int, name: str) -> Linear:
        if number in self.left:
            return Dense(self._taken(WEIGHT, number, name))
        planes, tables = (self._taken(ending, number, name) for ending in (CODES, TABLES))
        return Sketched(planes, tables, self.shards[number].columns)

    def _endings(self) -> tuple[str, ...]:
        return (CODES, TABLES, WEIGHT) if self.left else (CODES, TABLES)

    def _taken(self, ending: str, number: int, name: str) -> Tensor:
        if (ending, number) not in self._loaded:
            raise UserError(f"{name}{ending}: is not in the checkpoint")
        return self._loaded[ending, number]

    def _taking(self, ending: str) -> Any:
        def take(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            number = _QKV[shard] if isinstance(shard, str) else shard or 0
            own = self.shards[number]
            if ending == WEIGHT:
                kept = own.outputs(own.inputs(loaded))
            elif ending == CODES:
                self.rows[number] = loaded.shape[1]
                kept = own.planes(loaded)
            else:
                kept = own.tables(loaded)
            # What is read lies in the processor's memory; the parameter lies where the worker is.
            self._loaded[ending, number] = kept.to(parameter.device, copy=True)

        return take


def _first_row(layer: Any, number: int, rows: int) -> int:
    """Where a worker's outputs of a linear begin."""
    if isinstance(layer, RowParallelLinear) or getattr(layer, "tp_size", 1) == 1:
        return 0
    rank = int(layer.tp_rank)
    if isinstance(layer, QKVParallelLinear) and number > 0:
        # Workers beyond the number of key heads hold copies.
        rank //= int(layer.num_kv_head_replicas)
    return rank * rows


def _first_column(layer: Any, columns: int) -> int:
    """Where a worker's inputs begin."""
    return int(layer.tp_rank) * columns if isinstance(layer, RowParallelLinear) else 0
