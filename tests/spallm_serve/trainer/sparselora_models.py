"""Tiny models for the tests of SparseLoRA, and what sparse layers do, said with masks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spallm_serve.adapter import LORA_A, LORA_B
from spallm_serve.examples import IGNORED
from spallm_serve.layers import SketchedLinear
from spallm_serve.sketch import Sketch
from spallm_serve.trainer.method import Batch
from spallm_serve.trainer.sparselora.layers import SparseAttention, SparseMlp
from spallm_serve.trainer.sparselora.method import SparseLora
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings
from spallm_serve.trainer.sparselora.tokens import dense_tokens
from tests.tiny_models import CONFIGS

GROUPED = LlamaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    attention_bias=True, mlp_bias=True, hidden_act="gelu", pad_token_id=0,
)  # fmt: skip
SPARSE = {
    "layers.0.mlp": 0.5, "layers.1.mlp": 0.97, "layers.1.self_attn": 0.5,
    "layers.2.self_attn": 0.25,
}  # fmt: skip
# Chats of several turns ("o": an output), and rows that are padded on either side ("_").
ROWS = ("__..oo..ooo.", "....o.......", "..oo..o..___")


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A random frozen model with random biases and norms, float32."""
    torch.manual_seed(seed)
    config = GROUPED if name == "grouped" else CONFIGS[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.requires_grad_(False).eval()


def sketched(model: PreTrainedModel, bits: int, groups: int) -> tuple[PreTrainedModel, ...]:
    """Two models of the same values: one with sketches in its blocks, one with dense weights."""
    dense, compressed = copy.deepcopy(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        shape = linear.out_features, linear.in_features
        codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
        tables = torch.randn(shape[0], groups, 1 << bits, generator=generator) * 0.2
        sketch = Sketch.from_codes(codes, tables)
        layer = SketchedLinear(shape[1], shape[0], bits, groups, linear.bias is not None)
        layer.load_state_dict({"codes": sketch.planes, "tables": sketch.tables}, strict=False)
        if linear.bias is not None:
            layer.bias = linear.bias
        compressed.set_submodule(name, layer)
        dense.get_submodule(name).weight.data = sketch.weight()
    return dense, compressed


def make_batch(rows: tuple[str, ...] = ROWS, vocabulary: int = 61, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = len(rows), len(rows[0])
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    output = torch.tensor([[letter == "o" for letter in row] for row in rows])
    mask = torch.tensor([[int(letter != "_") for letter in row] for row in rows])
    return {
        "input_ids": ids * mask,
        "labels": torch.where(output, ids, IGNORED),
        "attention_mask": mask,
    }


def prepared(
    model: PreTrainedModel, trained: bool = True, **settings: object
) -> tuple[SparseLora, dict[str, nn.Parameter]]:
    """The method in a model, with LoRAs that do something unless ``trained`` is false."""
    wanted = {"sparsity": SPARSE, "start": 0.0, "rank": 3, "alpha": 6.0, **settings}
    method = SparseLora(SparseLoraSettings.model_validate(wanted))
    torch.manual_seed(3)
    parameters = method.prepare(model, {})
    if trained:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return method, parameters


def loss_of(model: PreTrainedModel, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
    """The mean over loss tokens; from embeddings where a gradient by them is wanted."""
    inputs = {"input_ids": batch["input_ids"]} if embeddings is None else {}
    more = {} if embeddings is None else {"inputs_embeds": embeddings}
    found = model(**inputs, **more, attention_mask=batch["attention_mask"], labels=batch["labels"])
    loss: Tensor = found.loss
    return loss


def chosen_channels(model: PreTrainedModel, run: Callable[[], object]) -> dict[str, object]:
    """What every sparse layer chose in a run, by the name it has in the model."""
    found: dict[str, object] = {}
    spied = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseMlp | SparseAttention)
    }

    def spy(name: str, choose: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        def chosen(x: Tensor) -> object:
            found[name.removesuffix(".sparse")] = choose(x)
            return found[name.removesuffix(".sparse")]

        return chosen

    for name, module in spied.items():
        module.choose = spy(name, module.choose)  # type: ignore[method-assign,assignment]
    run()
    for module in spied.values():
        del module.choose
    return found


class MaskedLinear(nn.Module):
    """A linear with a LoRA, whose base has inputs or outputs zeroed for some tokens."""

    def __init__(self, linear: nn.Linear, context: Tensor, stop: bool) -> None:
        super().__init__()
        self.linear, self.context, self.stop = linear, context.reshape(-1, 1), stop
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.lora: tuple[Tensor, Tensor, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        sparse = self.inputs is not None or self.outputs is not None
        base = torch.where(self.context, flat.detach(), flat) if self.stop and sparse else flat
        if self.inputs is not None:
            base = base * self.mask(self.inputs, base.shape[1])
        y = F.linear(base, self.linear.weight)
        if self.outputs is not None:
            y = y * self.mask(self.outputs, y.shape[1])
        if self.linear.bias is not None:
            y = y + self.linear.bias
        if self.lora is not None:
            a, b, scale = self.lora
            y = y + scale * (flat @ a.T @ b.T)
        return y.view(*x.shape[:-1], -1)

    def mask(self, kept: Tensor, width: int) -> Tensor:
        channels = torch.zeros(width, dtype=torch.float64)
        channels[kept] = 1
        return torch.where(self.context, channels, torch.ones(width, dtype=torch.float64))


def oracle(
    model: PreTrainedModel,
    chosen: dict[str, object],
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    scale: float,
    stop: bool = False,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A dense float64 twin that computes all channels and zeroes those not chosen.

    Returns:
        The model, and its LoRA parameters by name.
    """
    twin = copy.deepcopy(model).double().eval()
    context = ~dense_tokens(batch["labels"])
    own = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    for name, linear in list(twin.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        masked = MaskedLinear(linear, context, stop and "self_attn" in name)
        if name + LORA_A in own:
            masked.lora = own[name + LORA_A], own[name + LORA_B], scale
        site, _, last = name.rpartition(".")
        kept = chosen.get(site)
        if isinstance(kept, Tensor) and last == "down_proj":
            masked.inputs = kept
        if isinstance(kept, dict):
            attention = twin.get_submodule(site)
            if last == "o_proj":
                groups = attention.num_key_value_groups
                head, values = attention.head_dim, kept["v_proj"].tolist()
                masked.inputs = torch.tensor(
                    [
                        query * head + channel
                        for query in range(linear.in_features // head)
                        for channel in range(head)
                        if query // groups * head + channel in values
                    ]
                )
            elif last in kept:
                masked.outputs = kept[last]
        twin.set_submodule(name, masked)
    return twin, own
