"""Train the tables and norms of a compressed model to give the original's distributions.

Distillation and not next-token loss: the text then only says where to compare the two models, so
that recovery is not mistaken for adaptation to the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spallm_serve.checkpoint import CODES, TABLES, sketch_tensors
from spallm_serve.compressor.distillation import (
    TrainableLinear,
    distillation_loss,
    make_trainable,
)
from spallm_serve.compressor.observer import Observer
from spallm_serve.compressor.precision import compute_dtype
from spallm_serve.compressor.publish import REFINED_FILE, FinishedRun
from spallm_serve.compressor.refit import sort_tables
from spallm_serve.models import (
    map_weights,
    materialize,
    read_parameter,
    skeleton,
    weight_of,
)
from spallm_serve.sketch import Sketch

# Tokens a step: few, since for a given number of tokens more steps won over larger ones. The
# learning rate of a tensor is a share of its own root mean square, so that it suits models of any
# scale; it falls linearly to nothing. Four times these rates undid the start of SmolLM2 at 2 bits.
STEP_TOKENS = 512
TABLE_RATE = 0.005
NORM_RATE = 0.002
WARM_UP_STEPS = 5
_SAVE_EVERY = 10
_STATE_FILE = "refine-state"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def refine(finished: FinishedRun, tokens: Tensor, observer: Observer) -> list[float]:
    """Distil for ``settings.refine_steps`` steps on the calibration tokens; saved with the run.

    The original is mapped from its files, the compressed model is whole in memory. The state is
    saved every ten steps, and a run that was killed goes on from there with the same result.

    Args:
        finished: a run whose layers are all compressed.
        tokens: int64 ``[samples, seqlen]``.
        observer: is told of each step.

    Returns:
        The loss of every step, nats per token.
    """
    run, settings = finished.run, finished.settings
    if run.has(REFINED_FILE):
        return list(run.record(REFINED_FILE))
    device = torch.device(settings.device)
    dtype = compute_dtype(finished.source.reader, device)
    teacher = skeleton(finished.source.config)
    map_weights(teacher, finished.source, device)
    student, trained = _student(finished, device)
    optimizer = _optimizer(trained)
    losses: list[float] = []
    if run.has(_STATE_FILE):
        losses = list(run.record(_STATE_FILE))
        _restore(run.load(_STATE_FILE), trained, optimizer)

    steps = settings.refine_steps
    batch = max(1, STEP_TOKENS // tokens.shape[1])
    order = _sample_order(tokens.shape[0], batch * steps, settings.seed)
    observer.stage("refining", steps, "steps")
    for step in range(len(losses), steps):
        chosen = tokens[order[step * batch : (step + 1) * batch]].to(device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, steps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses.append(_step(student, teacher, chosen, optimizer))
        observer.refined(losses[-1])
        observer.step(step + 1)
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < steps:
            run.save(_STATE_FILE, _state(trained, optimizer), losses)
    run.save(REFINED_FILE, _refined_tensors(finished, student, trained), losses)
    return losses


def _student(
    finished: FinishedRun, device: torch.device
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    saved = finished.saved_tensors()
    model = skeleton(finished.source.config)
    sketches = {
        name: Sketch(saved.read(name + CODES), saved.read(name + TABLES), layer.columns)
        for name, layer in finished.plan.layers.items()
    }
    skip = set(model.all_tied_weights_keys) | {f"{name}.weight" for name in sketches}
    materialize(model, "", finished.source, device, skip=skip)
    model.float()
    for name, layer in finished.plan.embeddings.items():
        sketch = Sketch(saved.read(name + CODES), saved.read(name + TABLES), layer.columns)
        weight_of(model.get_submodule(name)).copy_(sketch.weight())
    model.tie_weights()
    return model, make_trainable(model, sketches, device)


def _optimizer(trained: dict[str, nn.Parameter]) -> torch.optim.Adam:
    groups = []
    for name, parameter in trained.items():
        share = TABLE_RATE if name.endswith(TABLES) else NORM_RATE
        rate = share * float(parameter.detach().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": rate, "peak": rate})
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short rise, then a straight fall."""
    return min((step + 1) / WARM_UP_STEPS, (steps - step) / steps)


def _sample_order(samples: int, count: int, seed: int) -> list[int]:
    """Indices of ``count`` samples: all of them in random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(samples, generator=generator).tolist()
    return order[:count]


def _step(
    student: nn.Module, teacher: nn.Module, tokens: Tensor, optimizer: torch.optim.Adam
) -> float:
    total = 0.0
    # One sequence at a time: logits over a whole vocabulary are the largest tensors of all.
    for sequence in tokens.split(1):
        with torch.no_grad():
            wanted = teacher(input_ids=sequence, use_cache=False).logits
        given = student(input_ids=sequence, use_cache=False).logits
        loss = distillation_loss(given, wanted) / tokens.shape[0]
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(
        [parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0
    )
    optimizer.step()
    optimizer.zero_grad()
    return total


def _state(trained: dict[str, nn.Parameter], optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        state[name] = parameter.detach().cpu()
        for moment in _MOMENTS:
            state[f"{name}/{moment}"] = optimizer.state[parameter][moment].cpu()
        state[f"{name}/step"] = optimizer.state[parameter]["step"].cpu()
    return state


@torch.no_grad()
def _restore(
    state: dict[str, Tensor], trained: dict[str, nn.Parameter], optimizer: torch.optim.Adam
) -> None:
    for name, parameter in trained.items():
        parameter.copy_(state[name])
        optimizer.state[parameter] = {
            moment: state[f"{name}/{moment}"].to(parameter.device) for moment in _MOMENTS
        } | {"step": state[f"{name}/step"]}


def _refined_tensors(
    finished: FinishedRun, student: nn.Module, trained: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    refined: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        if not name.endswith(TABLES):
            stored = read_parameter(finished.source, name, tuple(parameter.shape))
            refined[name] = parameter.detach().to("cpu", stored.dtype)
            continue
        layer = student.get_submodule(name.removesuffix(TABLES))
        assert isinstance(layer, TrainableLinear)
        # Training may make entries trade places; tables are kept in ascending order.
        codes, tables = sort_tables(layer.codes, layer.tables.detach())
        sketch = Sketch.from_codes(codes.cpu(), tables.cpu())
        refined |= sketch_tensors(name.removesuffix(TABLES), sketch)
    return refined
