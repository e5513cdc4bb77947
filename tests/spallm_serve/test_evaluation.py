"""Perplexity, divergence and multiple choice against direct computations."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spallm_serve.evaluation import (
    Estimate,
    Question,
    accuracy,
    choose,
    compare,
    mean_estimate,
    parse_question,
    perplexity,
    perplexity_estimate,
    window_loss,
)
from spallm_serve.models import load_tokenizer
from tests.tiny_models import save_tiny, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    source = save_tiny("llama", tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture(scope="module")
def other(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.04 * torch.randn(weight.shape, generator=generator))
    return changed


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 131, (5, 13), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def exact_logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(input_ids=window[None]).logits[0, :-1]


def spread(values: list[float]) -> float:
    """Standard error of a mean by its formula."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def test_perplexity_is_that_of_the_models_own_loss(model: PreTrainedModel, windows: Tensor) -> None:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        losses = [float(exact(input_ids=w[None], labels=w[None]).loss) for w in windows]
    seen: list[int] = []
    found = perplexity(model, windows, seen.append)
    wanted = math.exp(sum(losses) / len(losses))
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.standard_error == pytest.approx(wanted * spread(losses), rel=1e-4)
    assert seen == [1, 2, 3, 4, 5]


def test_standard_errors() -> None:
    values = [1.0, 4.0, -2.0, 0.5]
    found = mean_estimate(torch.tensor(values))
    assert found.value == pytest.approx(0.875)
    assert found.standard_error == pytest.approx(spread(values))
    found = perplexity_estimate(torch.tensor(values))
    assert found.value == pytest.approx(math.exp(0.875))
    assert found.standard_error == pytest.approx(math.exp(0.875) * spread(values))
    assert mean_estimate(torch.tensor([3.0])).value == 3
    assert math.isnan(mean_estimate(torch.tensor([3.0])).standard_error)
    assert str(Estimate(1.23456, 0.0123)) == "1.235 ± 0.012"


def test_window_loss() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    window = torch.tensor([[0, 3, 6, 1, 1]])
    probabilities = logits.double().softmax(-1)
    wanted = -sum(math.log(float(probabilities[i, window[0, i + 1]])) for i in range(4)) / 4
    assert float(window_loss(logits.log_softmax(-1), window)) == pytest.approx(wanted, rel=1e-5)


def test_a_model_is_its_own_equal(model: PreTrainedModel, windows: Tensor) -> None:
    found = compare(model, model, windows)
    assert found.divergence == Estimate(0, 0)
    assert found.agreement == Estimate(1, 0)
    assert found.original == found.compressed == perplexity(model, windows)
    assert (found.windows, found.tokens) == (5, 5 * 12)


def test_divergence_and_agreement(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor
) -> None:
    divergences, agreements = [], []
    for window in windows:
        p, q = (exact_logits(each, window).softmax(-1) for each in (model, other))
        rows = [
            sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(*row, strict=True))
            for row in zip(p, q, strict=True)
        ]
        divergences.append(sum(rows) / len(rows))
        same = [float(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)]
        agreements.append(sum(same) / len(same))
    seen: list[int] = []
    found = compare(model, other, windows, seen.append)
    assert found.divergence.value == pytest.approx(sum(divergences) / 5, rel=1e-4)
    assert found.divergence.standard_error == pytest.approx(spread(divergences), rel=1e-3)
    assert 0 < found.agreement.value < 1
    assert found.agreement.value == pytest.approx(sum(agreements) / 5, rel=1e-6)
    assert found.agreement.standard_error == pytest.approx(spread(agreements), rel=1e-5)
    assert found.compressed.value == pytest.approx(perplexity(other, windows).value)
    assert seen == [1, 2, 3, 4, 5]
    assert compare(other, model, windows).divergence != found.divergence


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
    assert found.value == pytest.approx(sum(right) / 5)
    assert found.standard_error == pytest.approx(spread(right), abs=1e-12)
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
