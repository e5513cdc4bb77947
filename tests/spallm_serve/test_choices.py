"""Multiple choice against one forward pass a token, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.choices import Question, accuracy, choose, parse_question
from spallm_serve.evaluation import mean_estimate
from spallm_serve.models import load_tokenizer
from tests.tiny_models import save_tiny, save_tokenizer


@pytest.fixture(scope="module", params=["llama", "gemma3", "mistral"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedModel:
    """The last two have windows that are shorter than the prompts."""
    source = save_tiny(request.param, tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(source).eval()


TRUE_FALSE = "Is it so?\n\nAnswer format: true/false"
MANY = "Which?\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3/answer4"


@pytest.mark.parametrize(
    ("entry", "options", "answer"),
    [
        ({"instruction": TRUE_FALSE, "answer": "false"}, ("true", "false"), 1),
        ({"instruction": TRUE_FALSE, "answer": "true", "input": "", "output": "x"},
         ("true", "false"), 0),
        ({"instruction": MANY, "answer": "answer3"},
         ("answer1", "answer2", "answer3", "answer4"), 2),
        ({"instruction": "Fill in.\n\nAnswer format: option1/option2  \n", "answer": "option2"},
         ("option1", "option2"), 1),
    ],
)  # fmt: skip
def test_questions(entry: dict[str, str], options: tuple[str, ...], answer: int) -> None:
    assert parse_question(entry) == Question(entry["instruction"], options, answer)


def test_question_with_input() -> None:
    entry = {"instruction": TRUE_FALSE, "answer": "true", "input": "Some text."}
    question = parse_question(entry)
    assert TRUE_FALSE in question.prompt
    assert "Some text." in question.prompt


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "object"),
        ("text", "object"),
        ({"instruction": TRUE_FALSE}, '"answer"'),
        ({"answer": "true"}, '"instruction"'),
        ({"instruction": TRUE_FALSE, "answer": True}, '"answer"'),
        ({"instruction": "Is it so?", "answer": "true"}, "Answer format"),
        ({"instruction": TRUE_FALSE + " and more text", "answer": "true"}, "Answer format"),
        ({"instruction": TRUE_FALSE, "answer": "maybe"}, "'maybe' is none of true/false"),
    ],
)
def test_what_is_no_question(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_question(entry)


# The second joins the last character of "... answer is" with the space that follows it.
MERGES = {
    "characters": (),
    "across the border": (("s", " "),),
    "whole options": ((" ", "t"), (" t", "r"), ("u", "e"), (" tr", "ue"), ("s", "e")),
}


@pytest.fixture(scope="module", params=MERGES)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(save_tokenizer(directory, merges=MERGES[request.param]))


@torch.no_grad()
def naive_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, prompt: str
) -> int:
    """Every token that is not the prompt's own is the option's; by characters, one by one."""
    exact = copy.deepcopy(model).double()
    means = []
    for option in question.options:
        whole = tokenizer(f"{prompt} {option}", add_special_tokens=False)["input_ids"]
        own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        first = next(i for i in range(len(whole)) if whole[: i + 1] != own[: i + 1])
        logs = [
            float(exact(torch.tensor([whole[:i]])).logits[0, -1].log_softmax(-1)[whole[i]])
            for i in range(first, len(whole))
        ]
        means.append(sum(logs) / len(logs))
    return max(range(len(means)), key=means.__getitem__)


def questions() -> list[Question]:
    texts = ["Is it so?", "Sky is blue", "7 > 8", "No!", "What is this"]
    options = ["true", "false", "unknown", "sea"]
    return [
        Question(text, (*options[i % 4 :], *options[: i % 4]), i % 4)
        for i, text in enumerate(texts)
    ]


def chat_prompt(question: Question) -> str:
    return f"[user] {question.prompt}\n[assistant] the correct answer is"


def test_choice_is_the_likeliest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    chosen = [choose(model, tokenizer, question) for question in questions()]
    assert chosen == [
        naive_choice(model, tokenizer, question, chat_prompt(question)) for question in questions()
    ]
    seen: list[int] = []
    found = accuracy(model, tokenizer, iter(questions()), seen.append)
    right = [float(c == q.answer) for c, q in zip(chosen, questions(), strict=True)]
    assert found == mean_estimate(torch.tensor(right))
    assert seen == [1, 2, 3, 4, 5]


def test_choice_without_a_chat_template(model: PreTrainedModel, tmp_path: Path) -> None:
    plain = load_tokenizer(save_tokenizer(tmp_path, chat_template=None, merges=(("s", " "),)))
    for question in questions():
        prompt = f"{question.prompt}\n\nthe correct answer is"
        assert choose(model, plain, question) == naive_choice(model, plain, question, prompt)


def test_choices_are_not_all_one(model: PreTrainedModel, tmp_path: Path) -> None:
    """Or the tests above would tell little."""
    plain = load_tokenizer(save_tokenizer(tmp_path))
    assert len({choose(model, plain, question) for question in questions()}) > 1


def test_choice_of_a_model_without_buffers(tmp_path: Path) -> None:
    opt = AutoModelForCausalLM.from_pretrained(save_tiny("opt", tmp_path)).eval()
    plain = load_tokenizer(save_tokenizer(tmp_path))
    question = questions()[0]
    assert choose(opt, plain, question) == naive_choice(opt, plain, question, chat_prompt(question))
