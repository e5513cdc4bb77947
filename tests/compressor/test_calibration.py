"""Where calibration tokens come from."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spallm_serve.compressor.calibration import calibration_tokens
from spallm_serve.compressor.settings import CompressSettings
from spallm_serve.errors import UserError
from spallm_serve.models import ModelSource, load_model, load_tokenizer, open_source
from tests.tiny_models import CONFIGS, save_tiny, save_tokenizer


def settings(**given: object) -> CompressSettings:
    return CompressSettings.model_validate({"samples": 16, "seqlen": 24} | given)


def ignore(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(save_tiny("llama", directory / "tiny"))
    return open_source(str(directory / "tiny"), directory / "scratch")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2", "opt"])
def test_text_the_model_writes(name: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(name, tmp_path / "tiny")), tmp_path / "scratch")
    seen: list[int] = []
    tokens = calibration_tokens(source, settings(), seen.append)
    assert tokens.shape == (16, 24)
    assert tokens.dtype == torch.int64
    assert seen == list(range(2, 25))
    start, end = source.config.bos_token_id, source.config.eos_token_id
    assert bool((tokens[:, 0] == start).all())
    assert not bool((tokens[:, 1:] == end).any())
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 131
    assert torch.equal(calibration_tokens(source, settings(), ignore), tokens)
    assert not torch.equal(calibration_tokens(source, settings(seed=1), ignore), tokens)


@torch.no_grad()
def test_it_is_drawn_from_the_models_distribution(source: ModelSource) -> None:
    """Its log likelihood is minus the entropy, up to chance; judged without a key-value cache."""
    tokens = calibration_tokens(source, settings(samples=64), ignore)
    logits = load_model(source.directory)(input_ids=tokens).logits[:, :-1].double()
    logits[..., source.config.eos_token_id] = -torch.inf
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs.clamp(min=-1e9)).sum(-1)
    drawn = logs.gather(2, tokens[:, 1:, None])[..., 0]
    excess = (drawn + entropy).flatten()
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / len(excess) ** 0.5
    # Uniform draws would be told apart.
    assert float(entropy.mean()) < 4.5


def test_model_with_several_ends_and_no_start(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path / "tiny")), tmp_path / "scratch")
    source.config.bos_token_id = None
    source.config.eos_token_id = ends = list(range(2, 60))
    tokens = calibration_tokens(source, settings(), ignore)
    assert bool((tokens[:, 0] == 2).all())
    assert not set(tokens[:, 1:].flatten().tolist()) & set(ends)


def test_text_file(source: ModelSource, tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 5
    (tmp_path / "a.txt").write_text(text)
    chosen = settings(calibration=str(tmp_path / "a.txt"), samples=3, seqlen=8)
    tokens = calibration_tokens(source, chosen, ignore)
    tokenizer = load_tokenizer(source.directory)
    assert [tokenizer.decode(window) for window in tokens] == [text[:8], text[8:16], text[16:24]]
    fewer = chosen.model_copy(update={"samples": 100})
    assert calibration_tokens(source, fewer, ignore).shape == (len(text) // 8, 8)
    with pytest.raises(UserError, match="shorter than one window"):
        calibration_tokens(
            source, settings(calibration=str(tmp_path / "a.txt"), seqlen=999), ignore
        )
    with pytest.raises(UserError, match="no such file"):
        calibration_tokens(source, settings(calibration=str(tmp_path / "b.txt")), ignore)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_without_tokenizer(name: str, tmp_path: Path) -> None:
    """Where files are missing, transformers may make up a tokenizer without a vocabulary."""
    source = open_source(str(save_tiny(name, tmp_path / "tiny")), tmp_path / "scratch")
    (tmp_path / "a.txt").write_text("abc" * 50)
    with pytest.raises(UserError, match="no usable tokenizer"):
        calibration_tokens(source, settings(calibration=str(tmp_path / "a.txt")), ignore)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    pairs = [(first, second) for first in "abcdefg" for second in "hijklmn"]
    model = save_tokenizer(save_tiny("llama", tmp_path / "tiny"), merges=tuple(pairs))
    (tmp_path / "a.txt").write_text("gn" * 50)
    source = open_source(str(model), tmp_path / "scratch")
    with pytest.raises(UserError, match=r"148.*131.*do not belong together"):
        calibration_tokens(source, settings(calibration=str(tmp_path / "a.txt")), ignore)


def test_dataset_without_the_package(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'spallm-serve\[train\]'"):
        calibration_tokens(source, settings(calibration="hf:owner/name"), ignore)


def test_dataset(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the one function that is used, as its documentation describes it."""
    read: list[int] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, object]]:
        if name == "owner/none":
            raise ValueError("no such dataset\nand more")
        assert (name, split, streaming) == ("owner/name", "train", True)

        def rows() -> Iterator[dict[str, object]]:
            for number in range(1000):
                read.append(number)
                yield {"text": "abcdefg", "id": number} if number % 2 else {"text": None}

        return rows()

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    chosen = settings(calibration="hf:owner/name", samples=3, seqlen=8)
    tokens = calibration_tokens(source, chosen, ignore)
    tokenizer = load_tokenizer(source.directory)
    assert "".join(map(tokenizer.decode, tokens)) == "abcdefg</s>" * 3
    assert len(read) < 20
    with pytest.raises(UserError, match="owner/none: cannot be read") as caught:
        calibration_tokens(source, settings(calibration="hf:owner/none"), ignore)
    assert "\n" not in str(caught.value)
