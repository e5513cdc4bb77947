"""Rows of files to token ids and labels, and what is said about rows that teach nothing."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spallm_serve import examples, rows
from spallm_serve.errors import UserError
from spallm_serve.examples import IGNORED, Example, stream_examples
from spallm_serve.models import load_tokenizer
from spallm_serve.rows import read_lines
from tests.tiny_models import save_tokenizer

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("plain")
    return load_tokenizer(save_tokenizer(directory, chat_template=None))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def with_template(directory: Path, template: str, **options: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tokenizer(directory, chat_template=template, **options))


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(
    row: object, tokenizer: PreTrainedTokenizerBase, directory: Path, max_length: int = 1000
) -> Example:
    (example,) = stream_examples(write(directory / "row.jsonl", row), tokenizer, max_length)
    return example


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example with each run of outputs between « and »."""
    text, inside = "", False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if (label != IGNORED) != inside:
            text += "»" if inside else "«"
            inside = not inside
        text += tokenizer.decode([token])
    return text + "»" * inside


CHAT_ROWS = [
    ({"messages": [USER, ASSISTANT]}, "[user] hi\n[assistant] «ho\n»"),
    (
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]},
        "[system] s\n[user] hi\n[assistant] «ho\n»[user] hi\n[assistant] «ho\n»",
    ),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        "[user] hi\n[assistant] «ho\n»",
    ),
    ({"prompt": "hi", "completion": "ho"}, "[user] hi\n[assistant] «ho\n»"),
    (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, USER, ASSISTANT]},
        "[user] hi\n[assistant] ho\n[user] hi\n[assistant] «ho\n»[user] hi\n[assistant] «ho\n»",
    ),
    ({"instruction": "hi", "input": "", "output": "ho"}, "[user] hi\n[assistant] «ho\n»"),
    (
        {"instruction": "hi", "input": "in", "output": "ho", "answer": "x", "id": 3},
        "[user] hi\n\nin\n[assistant] «ho\n»",
    ),
    ({"question": "hi", "answer": "ho"}, "[user] hi\n[assistant] «ho\n»"),
    ({"messages": None, "text": "ho"}, "«ho</s>»"),
]


@pytest.mark.parametrize(("row", "text"), CHAT_ROWS)
def test_rows_through_the_chat_template(
    row: object, text: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert marked(read(row, tokenizer, tmp_path), tokenizer) == text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a ", "completion": "b"}, "a «b</s>»"),
        ({"prompt": "", "completion": "b"}, "«b</s>»"),
        ({"prompt": "a", "completion": "b</s>"}, "a«b</s>»"),
        ({"text": "a{}b"}, "«a{}b</s>»"),
        (
            {"instruction": "{}", "input": None, "output": "o"},
            "### Instruction:\n{}\n\n### Response:\n«o</s>»",
        ),
        (
            {"instruction": "i", "input": "n", "output": "o"},
            "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n«o</s>»",
        ),
        ({"question": "q", "answer": "a"}, "Question:\nq\n\nAnswer:\n«a</s>»"),
    ],
)
def test_rows_without_a_chat_template(
    row: object, text: str, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert marked(read(row, plain, tmp_path), plain) == text


_WORDS = st.text(alphabet="ab [user]\n", min_size=1).filter(str.strip)


@settings(deadline=None)
@given(turns=st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=5), system=_WORDS | st.none())
def test_outputs_are_the_assistants_turns(
    turns: list[tuple[str, str]],
    system: str | None,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    expected = "" if system is None else f"[system] {system}\n"
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
        expected += f"[user] {question}\n[assistant] «{answer}\n»"
    assert marked(read({"messages": messages}, tokenizer, scratch), tokenizer) == expected


def test_formats_may_be_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row for row, _ in CHAT_ROWS]
    lines = stream_examples(write(tmp_path / "a.jsonl", *rows), tokenizer, 100)
    assert [marked(example, tokenizer) for example in lines] == [text for _, text in CHAT_ROWS]
    # The same as one list; and a .json that is rows of JSONL all the same.
    expected = list(stream_examples(tmp_path / "a.jsonl", tokenizer, 100))
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(rows, indent=2))
    assert list(stream_examples(tmp_path / "list.json", tokenizer, 100)) == expected
    lined = write(tmp_path / "lines.json", *rows, "  ")
    assert list(stream_examples(lined, tokenizer, 100)) == expected


def test_a_byte_order_mark_and_line_separators(
    tmp_path: Path, plain: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\r\n\r\n{"text": "b\x85"}'.encode())
    first, second = stream_examples(path, plain, 9)
    assert marked(first, plain) == "«a</s>»"
    assert len(second.input_ids) == 3


def test_rows_are_read_when_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", *[{"text": "fine"}] * 3, "broken")
    assert len(list(islice(stream_examples(path, tokenizer, 9), 3))) == 3


def test_a_turn_ends_in_its_end_token_though_it_pads(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
        "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = with_template(tmp_path, template)
    tokenizer.pad_token = tokenizer.eos_token
    example = read({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, tokenizer, tmp_path)
    expected = "<s><user>hi</s><assistant>«ho</s>»<user>hi</s><assistant>«ho</s>»"
    assert marked(example, tokenizer) == expected
    answer = read({"text": "a"}, tokenizer, tmp_path)
    assert answer.labels[-1] == tokenizer.pad_token_id


def test_a_tokens_beginning_of_text_stays_context(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, chat_template=None))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert marked(read({"text": "ab"}, tokenizer, tmp_path), tokenizer) == "<s>«ab</s>»"
    assert marked(read({"text": "<s>ab"}, tokenizer, tmp_path), tokenizer) == "«<s>ab</s>»"
    row = {"prompt": "abcd", "completion": "ef"}
    cut = read(row, tokenizer, tmp_path, max_length=5)
    assert marked(cut, tokenizer) == "<s>d«ef</s>»"
    assert cut.truncated == 3


def test_a_token_across_the_border_is_context(tmp_path: Path) -> None:
    merges = (("a", "b"), ("c", "\n"))
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, merges=merges, chat_template=None))
    row = {"prompt": "xa", "completion": "bcb"}
    assert marked(read(row, tokenizer, tmp_path), tokenizer) == "xab«cb</s>»"
    with pytest.raises(UserError, match=r"row\.jsonl:1: every token is masked"):
        # The merge takes the one output, and a model without an end token has no other.
        tokenizer.eos_token = None
        read({"prompt": "xa", "completion": "b"}, tokenizer, tmp_path)


def byte_tokenizer(*merges: tuple[str, str], trim_offsets: bool) -> PreTrainedTokenizerBase:
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(alphabet)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_offsets_that_leave_out_the_space_of_a_word(trim_offsets: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(("Ġ", "w"), trim_offsets=trim_offsets)
    across = read({"prompt": "a: ", "completion": "wo"}, tokenizer, tmp_path)
    assert marked(across, tokenizer) == "a: w«o»"
    before = read({"prompt": "a:", "completion": " wo"}, tokenizer, tmp_path)
    assert marked(before, tokenizer) == "a:« wo»"
    between = read({"prompt": "a: ", "completion": "o"}, tokenizer, tmp_path)
    assert marked(between, tokenizer) == "a: «o»"


@settings(deadline=None)
@given(context=st.text(alphabet="a é😀", max_size=6), output=st.text(alphabet="é😀b", min_size=1))
def test_characters_of_several_tokens(context: str, output: str, scratch: Path) -> None:
    tokenizer = byte_tokenizer(trim_offsets=False)
    example = read({"prompt": context + "x", "completion": output}, tokenizer, scratch)
    outputs = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(outputs) == output
    assert len(outputs) == len(output.encode())


TEMPLATES = {
    "rewrites history": (
        "{% for message in messages %}<{{ message['role'] }}>"
        "{% if loop.last and message['role'] == 'assistant' %}(think){% endif %}"
        "{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "generation prompt": (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
        "{% endfor %}"
    ),
    "other prompt": (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>(think){% endif %}"
    ),
    "no system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nhere') }}"
        "{% endif %}{% for message in messages %}{{ message['content'] }};{% endfor %}"
    ),
}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("rewrites history", r"row\.jsonl:1: .*rewrites turn 2,"),
        ("generation prompt", r"row\.jsonl:1: .*without a generation prompt"),
        ("other prompt", r"row\.jsonl:1: .*turn 2 does not begin as"),
        ("no system", r"row\.jsonl:1: refused by the chat template \(no system\)"),
    ],
)
def test_templates_that_give_no_mask(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, TEMPLATES[template])
    system = [{"role": "system", "content": "s"}] if template == "no system" else []
    row = {"messages": [*system, USER, ASSISTANT, USER, ASSISTANT]}
    with pytest.raises(UserError, match=message) as caught:
        read(row, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_templates_may_need_no_generation_prompt(tmp_path: Path) -> None:
    """As Llama 2's, where the answer follows the user's turn without a heading."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }} </s>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, template)
    example = read({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, tokenizer, tmp_path)
    expected = "[INST] hi [/INST]« ho </s>»" * 2
    assert marked(example, tokenizer) == expected


def test_a_template_may_open_the_answer(tmp_path: Path) -> None:
    """As Qwen3's, which puts empty thoughts before the last answer only."""
    tokenizer = with_template(tmp_path, TEMPLATES["rewrites history"])
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    expected = "<user>hi\n<assistant>ho\n<user>hi\n<assistant>«(think)ho\n»"
    assert marked(read(row, tokenizer, tmp_path), tokenizer) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not an object"),
        ('"text"', "not an object"),
        ({"title": "x"}, '"messages".*"conversations".*"prompt".*"question".*"text"'),
        ({"instruction": "a", "output": None}, "none of the known formats"),
        ({"instruction": "a", "output": " "}, '"output" is empty'),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" is no string'),
        ({"prompt": "a", "completion": [ASSISTANT]}, '"completion" is no string'),
        ({"prompt": [USER], "completion": []}, '"completion" is no list of turns'),
        ({"question": 3, "answer": "b"}, '"question" is no string'),
        ({"text": ""}, '"text" is empty'),
        ('{"text": "\\ud800"}', "surrogate"),
        ({"messages": "hello"}, "no list of turns"),
        ({"messages": ["hello"]}, 'turn 1 of "messages" has no "role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, '"content" is no string'),
        ({"messages": [{"role": ["user"], "content": "a"}]}, '"role" is no string'),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 1 .*'tool'.*assistant"),
        ({"messages": [USER]}, "ends with a turn of the user"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "begins with a turn of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, '"content" is empty'),
    ],
)  # fmt: skip
def test_rows_that_teach_nothing(
    row: object, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, "", row)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}") as caught:
        list(stream_examples(path, tokenizer, 100))
    assert "\n" not in str(caught.value)


def test_a_conversation_without_a_template(tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"row\.jsonl:1: .*no chat template"):
        read({"messages": [USER, ASSISTANT]}, plain, tmp_path)


def test_files_that_cannot_be_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            list(stream_examples(path, tokenizer, 100))
        assert str(path) in str(caught.value)
        return str(caught.value)

    for name in ("absent.jsonl", "absent.json", "absent.txt"):
        assert "no such file" in refused(tmp_path / name)
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        assert "empty" in refused(tmp_path / name)
    assert "empty" in refused(write(tmp_path / "list.json", "[]"))
    assert "row 2: not an object" in refused(write(tmp_path / "list.json", [{"text": "a"}, 3]))
    latin = '{"text": "é"}'.encode("latin-1")
    (tmp_path / "latin.jsonl").write_bytes(b"\n" + latin)
    assert "latin.jsonl:2: not UTF-8" in refused(tmp_path / "latin.jsonl")
    (tmp_path / "latin.txt").write_bytes(latin)
    assert "not UTF-8" in refused(tmp_path / "latin.txt")
    assert "cannot be read" in refused(tmp_path)
    monkeypatch.setattr(rows, "MAX_LIST_BYTES", 2**20)
    (tmp_path / "big.json").write_text("[" + " " * 2**20 + "]")
    assert "more than 1 MiB" in refused(tmp_path / "big.json")
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * 2**20 + '"}\n')
    assert "long.jsonl:2: longer than 1 MiB" in refused(tmp_path / "long.jsonl")


def test_lines_that_are_not_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "", "one", " \t", "two")
    assert list(read_lines(path)) == [(f"{path}:2", b"one\n"), (f"{path}:4", b"two\n")]


def test_example_too_long_is_refused_if_strict(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "abcd"})
    with pytest.raises(UserError, match=r"a\.jsonl:2: 5 tokens, over the limit of 4"):
        list(stream_examples(path, tokenizer, 4, strict=True))
    with pytest.raises(ValueError, match="1 tokens"):
        next(stream_examples(path, tokenizer, 1))


@settings(deadline=None)
@given(context=st.integers(0, 12), output=st.integers(1, 12), max_length=st.integers(2, 16))
def test_an_example_too_long_is_cut(
    context: int,
    output: int,
    max_length: int,
    plain: PreTrainedTokenizerBase,
    scratch: Path,
) -> None:
    prompt = "abcdefghijkl"[:context]
    answer = "ABCDEFGHIJKL"[:output]
    row = {"prompt": prompt, "completion": answer}
    example = read(row, plain, scratch, max_length)
    whole = read(row, plain, scratch)
    assert whole.truncated == 0
    assert len(example.input_ids) == min(max_length, len(whole.input_ids))
    assert example.truncated == len(whole.input_ids) - len(example.input_ids)
    # A stretch of the whole that has the border in it.
    kept = sum(label == IGNORED for label in example.labels)
    stretch = slice(context - kept, context - kept + len(example.input_ids))
    assert example.input_ids == whole.input_ids[stretch]
    assert example.labels == whole.labels[stretch]
    # All of the output if it fits with a token of context, or else that token and its beginning.
    if output + 1 + (context > 0) <= max_length:
        assert example.labels[-1] == plain.eos_token_id
    else:
        assert kept == min(context, 1)


@settings(deadline=None)
@given(
    words=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=30),
    length=st.integers(2, 9),
    block=st.integers(1, 40),
)
def test_a_text_in_chunks(
    words: list[str], length: int, block: int, plain: PreTrainedTokenizerBase, scratch: Path
) -> None:
    text = "a" + " ".join(words)
    path = scratch / "a.txt"
    path.write_text(text, encoding="utf-8")
    whole = tuple(plain(text, add_special_tokens=False)["input_ids"])
    expected = [whole[at : at + length] for at in range(0, len(whole), length)]
    expected = [chunk for chunk in expected if len(chunk) > 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_BLOCK_CHARACTERS", block)
        if not expected:
            with pytest.raises(UserError, match="single token"):
                list(stream_examples(path, plain, length))
        else:
            chunks = list(stream_examples(path, plain, length))
            assert chunks == [Example(chunk, chunk) for chunk in expected]


def test_words_of_a_text_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(("a", "b"), ("Ġ", "ab"), ("Ġab", "a"), trim_offsets=False)
    text = "ab aba ab.\n\n aba, ab\n" * 9
    (tmp_path / "a.txt").write_text(text)
    expected = tokenizer(text)["input_ids"]
    for block in range(16, 40):
        monkeypatch.setattr(examples, "_BLOCK_CHARACTERS", block)
        chunks = stream_examples(tmp_path / "a.txt", tokenizer, 2)
        assert [token for chunk in chunks for token in chunk.input_ids] == expected


def test_a_tokenizer_without_offsets(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    class Slow:
        is_fast = False

    path = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="fast tokenizer"):
        next(stream_examples(path, Slow(), 9))  # type: ignore[arg-type]
