"""Tasks with exact answers: which questions are asked, and which answers are right."""

import random
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from recoup.schemas import Match, Prompt, TaskSpec
from recoup_ml.errors import EmptyDataset
from recoup_ml.run import Run, Task
from recoup_ml.tasks import Questions, is_right, questions

FILE = "file-" + "0" * 24


@pytest.mark.parametrize(
    ("match", "answer", "reference"),
    [
        ("exact", " Paris\n", "Paris"),
        ("contains", "It is PARIS, of course.", "paris"),
        ("contains", "The treaty of\nVersailles", "treaty of Versailles."),
        ("number", "6 * 7 makes 42.", "#### 42"),
        ("number", "Of the 3, one half: $1,000", "1000.0"),
    ],
)
def test_an_answer_is_right(match: Match, answer: str, reference: str) -> None:
    assert is_right(answer, reference, match)


@pytest.mark.parametrize(
    ("match", "answer", "reference"),
    [
        ("exact", "paris", "Paris"),
        ("exact", "Paris.", "Paris"),
        ("contains", "Parisian", "Paris"),
        ("contains", "", "Paris"),
        ("number", "42, no, 43", "42"),
        ("number", "forty-two", "42"),
        ("number", "42", "forty-two"),
    ],
)
def test_an_answer_is_wrong(match: Match, answer: str, reference: str) -> None:
    assert not is_right(answer, reference, match)


@pytest.mark.parametrize("match", ["exact", "contains", "number"])
def test_the_reference_itself_is_right_by_every_match(match: Match) -> None:
    assert is_right("It is 42", "It is 42", match)


@pytest.fixture
def pose(
    make_run: Callable[..., Run], tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> Callable[..., Questions]:
    """`pose(match="number")`: the task of all prompts, or of others, as a model is asked it."""

    def pose(rows: list[Prompt] = prompts, run: Run | None = None, **spec: object) -> Questions:
        task = Task(TaskSpec(name="words", file=FILE, **spec), rows)
        return questions(task, run or make_run("copy", evaluation={"task_rows": 16}), tokenizer)

    return pose


def test_the_same_rows_are_asked_whatever_order_they_come_in(
    pose: Callable[..., Questions], prompts: list[Prompt]
) -> None:
    turned = random.Random(0).sample(prompts, len(prompts))
    assert len(pose().items) == 16
    assert pose(turned) == pose()


def test_a_question_that_is_too_long_is_not_asked(
    pose: Callable[..., Questions], make_run: Callable[..., Run], prompts: list[Prompt]
) -> None:
    long = [item.model_copy(update={"messages": item.messages * 9}) for item in prompts[:5]]
    run = make_run("copy", training={"max_length": 28})
    assert len(pose([*prompts[:7], *long], run).items) == 7
    with pytest.raises(EmptyDataset, match="task words"):
        pose(long, run)


def test_an_answer_has_room_for_the_longest_reference(
    pose: Callable[..., Questions], prompts: list[Prompt]
) -> None:
    longest = [item for item in prompts if len((item.completion or "").split()) == 12][:1]
    assert pose(longest).max_new_tokens == pose([*longest, *prompts[:9]]).max_new_tokens == 12 + 8
    assert pose(max_new_tokens=3).max_new_tokens == 3


def test_an_answer_that_may_say_more_has_room_for_it(
    pose: Callable[..., Questions], make_run: Callable[..., Run]
) -> None:
    run = make_run("copy", generation={"max_new_tokens": 90})
    assert pose(run=run, match="contains").max_new_tokens == 90
    assert pose(run=run, match="exact").max_new_tokens <= 20
