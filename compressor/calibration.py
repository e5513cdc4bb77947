"""The tokens that a model is compressed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.data import file_windows, token_windows
from spallm_serve.errors import UserError
from spallm_serve.models import ModelSource, first_line, map_weights, skeleton

SELF = "self"
_DATASET_PREFIX = "hf:"


def calibration_tokens(
    source: ModelSource, settings: CompressSettings, on_step: Callable[[int], None]
) -> Tensor:
    """Calibration windows from the place the settings name.

    Args:
        source: the model; its tokenizer is not needed for ``self``.
        settings: of the run.
        on_step: called with the tokens a window has so far while the model writes its own text.

    Returns:
        int64 ``[windows, seqlen]``; fewer than ``samples`` where the text has no more.

    Raises:
        UserError: unreadable, empty or too short a text, or ids the model has no embedding for.
    """
    if settings.calibration == SELF:
        return sample_from_model(source, settings, on_step)
    tokenizer = source.tokenizer()
    if settings.calibration.startswith(_DATASET_PREFIX):
        name = settings.calibration.removeprefix(_DATASET_PREFIX)
        windows = token_windows(_dataset_texts(name), tokenizer, settings.seqlen, settings.samples)
        if windows.shape[0] == 0:
            raise UserError(f"{name}: is shorter than one window of {settings.seqlen} tokens")
    else:
        path = Path(settings.calibration)
        windows = file_windows(path, tokenizer, settings.seqlen, settings.samples)
    vocabulary = source.config.get_text_config(decoder=True).vocab_size
    if int(windows.max()) >= vocabulary:
        raise UserError(
            f"{source.directory}: the tokenizer gave id {int(windows.max())}, but the model has "
            f"{vocabulary} embeddings; tokenizer and model do not belong together"
        )
    return windows


@torch.no_grad()
def sample_from_model(
    source: ModelSource, settings: CompressSettings, on_step: Callable[[int], None]
) -> Tensor:
    """Text the model writes itself: sampled at temperature 1 from the start token, without ending.

    What a model writes is what it was trained on, in its own languages (LLM-QAT, Liu et al. 2023),
    so this works without any data. The weights are used in place, as the files are mapped into
    memory: the system may drop and read their pages again at any time.

    Returns:
        int64 ``[samples, seqlen]``.
    """
    model = skeleton(source.config)
    map_weights(model, source, torch.device(settings.device))
    text_config = source.config.get_text_config(decoder=True)
    start = text_config.bos_token_id
    if start is None:
        start = text_config.eos_token_id or 0
    start = start[0] if isinstance(start, list) else start
    ends = text_config.eos_token_id
    banned = [ends] if isinstance(ends, int) else list(ends or [])

    generator = torch.Generator(device=settings.device).manual_seed(settings.seed)
    tokens = torch.full((settings.samples, 1), start, device=settings.device)
    cache = None
    for step in range(1, settings.seqlen):
        output = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        logits[:, banned] = -torch.inf
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
        on_step(step + 1)
    return tokens.cpu()


def _dataset_texts(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"--calibration hf:{name} needs the package datasets: pip install 'spallm-serve[train]'"
        ) from error
    try:
        for row in load_dataset(name, split="train", streaming=True):
            if isinstance(row.get("text"), str):
                yield row["text"]
    except (OSError, ValueError) as error:
        raise UserError(f"hf:{name}: cannot be read ({first_line(error)})") from error
