"""What a preview shows: every token, with outputs apart from context."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.style import Style
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spallm_serve.examples import IGNORED, Example
from spallm_serve.models import load_tokenizer
from spallm_serve.preview import preview
from tests.tiny_models import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def example(tokenizer: PreTrainedTokenizerBase, context: str, output: str) -> Example:
    given = tokenizer(context, add_special_tokens=False)["input_ids"]
    learnt = tokenizer(output, add_special_tokens=False)["input_ids"]
    return Example((*given, *learnt), (*[IGNORED] * len(given), *learnt), truncated=1234)


def shown(tokenizer: PreTrainedTokenizerBase, *examples: Example) -> str:
    """What a console without colours prints after the legend."""
    console = Console(file=StringIO(), width=200, color_system=None)
    preview(examples, tokenizer, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    legend, _, rest = text.partition("\n\n")
    assert "⟦outputs⟧" in legend
    return rest


def test_without_colours(tokenizer: PreTrainedTokenizerBase) -> None:
    text = shown(tokenizer, example(tokenizer, "<s>ab c\nd", "[bold]e[/]</s>"))
    assert text == (
        "Example 1: 18 tokens, 11 of them in the loss (61%), 1,234 more cut off\n"
        "<s>ab·c↵\nd⟦[bold]e[/]</s>⟧\n"
    )


def test_outputs_between_context(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = example(tokenizer, "ab", "cd"), example(tokenizer, "ef", "g")
    chat = Example(first.input_ids + second.input_ids, first.labels + second.labels)
    assert "7 tokens, 3 of them in the loss (43%)\nab⟦cd⟧ef⟦g⟧\n" in shown(tokenizer, chat)
    lines = example(tokenizer, "a\n", "b\n")
    assert "a↵\n⟦b↵⟧\nab⟦cd⟧" in shown(
        tokenizer,
        Example(lines.input_ids + first.input_ids, lines.labels + first.labels),
    )


def test_the_first_token_is_never_in_the_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    text = shown(tokenizer, example(tokenizer, "", "abc"), example(tokenizer, "", "a"))
    assert "3 tokens, 2 of them in the loss (67%), 1,234 more cut off\na⟦bc⟧\n" in text
    assert "Example 2: 1 tokens, 0 of them in the loss (0%)" in text


def test_characters_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert "\né😀⟦😀é→x⟧\n" in shown(tokenizer, example(tokenizer, "é😀", "😀é→x"))
    # A border inside a character, and bytes that are none.
    whole = tokenizer("a😀b")["input_ids"]
    parted = Example(tuple(whole), (IGNORED, IGNORED, *whole[2:]))
    lines = shown(tokenizer, parted).splitlines()
    assert lines[1].startswith("a�⟦")
    assert lines[1].endswith("b⟧")


def test_a_terminal_gets_no_control_characters() -> None:
    tokenizer = byte_tokenizer()
    text = shown(tokenizer, example(tokenizer, "\x1b[31m\x07\r", "\x7f\x9b\x00\tx"))
    assert "\n␛[31m␇␍⟦␡\N{REPLACEMENT CHARACTER}␀⇥" in text
    assert not any(ord(character) < 32 for character in text.replace("\n", ""))


def test_the_space_of_a_first_word_is_kept() -> None:
    """SentencePiece's way: decoded alone, a word has no space before it."""
    vocabulary = {"▁": 0, "▁a": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = shown(tokenizer, Example((1, 1, 3, 1), (IGNORED, IGNORED, 3, 1)))
    assert "\na a⟦b a⟧\n" in text


def test_colours_tell_outputs_from_context(tokenizer: PreTrainedTokenizerBase) -> None:
    console = Console(
        file=StringIO(), width=200, color_system="standard", force_terminal=True, no_color=False
    )
    preview([example(tokenizer, "c", "o</s>")], tokenizer, console)
    line = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    styles = [("c", "dim"), ("o", "bold green"), ("</s>", "bold green underline")]
    system = console._color_system
    expected = [Style.parse(style).render(text, color_system=system) for text, style in styles]
    assert line == "".join(expected)
    assert "⟦" not in line
