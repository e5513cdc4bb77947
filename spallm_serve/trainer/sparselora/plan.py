"""How sparse each layer is: the paper's presets, an explicit choice, or what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spallm_serve.errors import UserError
from spallm_serve.trainer.sparselora.settings import SparseLoraSettings

_MLP, _ATTENTION = "sparsity.mlp", "sparsity.self_attn"
_PAPER_LAYERS = 32


@dataclass(frozen=True)
class SparsityPlan:
    """Share of the channels that context tokens do without, by layer; 0 is dense.

    Attributes:
        mlp: of the MLPs.
        self_attn: of the attention's channels.
    """

    mlp: tuple[float, ...]
    self_attn: tuple[float, ...]

    @property
    def is_dense(self) -> bool:
        """Whether no layer is sparse."""
        return not any(self.mlp) and not any(self.self_attn)

    def tensors(self) -> dict[str, Tensor]:
        """The plan as float64 ``[layers]`` by name, to be saved with a run."""
        return {
            _MLP: torch.tensor(self.mlp, dtype=torch.float64),
            _ATTENTION: torch.tensor(self.self_attn, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SparsityPlan:
        """Inverse of :meth:`tensors`."""
        return cls(tuple(tensors[_MLP].tolist()), tuple(tensors[_ATTENTION].tolist()))


def resolve_plan(settings: SparseLoraSettings, layers: int) -> SparsityPlan:
    """The plan of settings that need no measuring (all but ``auto``).

    Raises:
        UserError: a layer the model does not have.
    """
    if isinstance(settings.sparsity, str):
        return _PRESETS[settings.sparsity](layers)
    by_kind = {"mlp": [0.0] * layers, "self_attn": [0.0] * layers}
    for site, share in settings.sparsity.items():
        _, layer, kind = site.split(".")
        if int(layer) >= layers:
            raise UserError(
                f"sparsity: {site}: the model has {layers} layers, numbered 0 to {layers - 1}"
            )
        by_kind[kind][int(layer)] = share
    return SparsityPlan(tuple(by_kind["mlp"]), tuple(by_kind["self_attn"]))


def _preset(
    mlp: tuple[range, float], attention: tuple[range, float], dense: tuple[int, ...]
) -> Callable[[int], SparsityPlan]:
    def plan(layers: int) -> SparsityPlan:
        # The first layer is the paper's first and the last its last, those between keep their
        # relative depth. In all presets both ends are dense.
        step = (_PAPER_LAYERS - 1) / max(layers - 1, 1)
        places = [int(layer * step + 0.5) for layer in range(layers)]
        return SparsityPlan(
            tuple(mlp[1] if place in mlp[0] else 0.0 for place in places),
            tuple(
                attention[1] if place in attention[0] and place not in dense else 0.0
                for place in places
            ),
        )

    return plan


# SparseLoRA, table 12 and section 4: LLaMA3-8B on CSR170K, and the sparser one of table 9.
_PRESETS = {
    "none": _preset((range(0), 0.0), (range(0), 0.0), ()),
    "o1": _preset((range(17, 31), 0.97), (range(17, 30), 0.20), (20, 24)),
    "o2": _preset((range(3, 31), 0.99), (range(14, 30), 0.75), (20, 24)),
}
