"""What a student is taught, step by step."""

import pytest
import torch
from transformers import PreTrainedModel

from recoup_ml.lessons import FixedCourse, Lesson, RolloutCourse, distributions, draws, texts
from recoup_ml.observation import observe
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.targets import Hidden, Tokens, TopK


@pytest.fixture(scope="module")
def seen(healthy: PreTrainedModel, answered: list[Answered]) -> tuple[list[Answered], object]:
    return answered[:10], observe(healthy, answered[:10], 0)


@pytest.mark.parametrize(("top_k", "kind"), [(None, Hidden), (8, TopK)])
def test_a_teacher_observed_gives_a_target_for_every_position(
    top_k: int | None, kind: type, seen: tuple
) -> None:
    lesson = distributions(*seen, top_k, 1.0)
    assert all(isinstance(target, kind) for target in lesson.targets)
    sizes = [len(target.hidden_ND if kind is Hidden else target.ids_NK) for target in lesson.targets]
    assert sizes == [len(answer.answer_ids) for answer in lesson.answers]
    assert lesson.positions == sum(sizes)


def test_a_text_is_its_own_target(answered: list[Answered]) -> None:
    lesson = texts(answered[:3])
    assert all(isinstance(target, Tokens) for target in lesson.targets)
    assert [tuple(target.ids_N.tolist()) for target in lesson.targets] == [a.answer_ids for a in answered[:3]]


def test_skipped_positions_are_not_counted(answered: list[Answered]) -> None:
    whole = texts(answered[:5])
    skipping = Lesson(whole.answers, whole.targets, skip=2)
    assert skipping.positions == sum(max(0, len(answer.answer_ids) - 2) for answer in answered[:5])
    assert skipping.rows([0]).skip == 2


@pytest.mark.parametrize(("answers", "size"), [(10, 4), (3, 8), (1, 2), (8, 8)])
def test_every_answer_is_seen_before_any_is_seen_again(answers: int, size: int) -> None:
    endless = draws(answers, size, seed=0)
    rows = [row for _ in range(6) for row in next(endless)]
    assert len(rows) == 6 * size
    for start in range(0, len(rows) - answers + 1, answers):
        assert sorted(rows[start : start + answers]) == list(range(answers))


def test_a_fixed_course_is_the_same_for_a_seed(answered: list[Answered]) -> None:
    lesson = texts(answered[:10])
    first, again, other = (FixedCourse(lesson, 4, seed) for seed in (0, 0, 1))
    assert [first.next().answers for _ in range(3)] == [again.next().answers for _ in range(3)]
    assert first.next().answers != other.next().answers


class Student:
    """Answers with its age: how often it has been asked."""

    def __init__(self, words: int = 2) -> None:
        self.age, self.asked, self._words = 0, [], words

    def answer(self, prompts: list[Encoded]) -> list[Answered]:
        self.age += 1
        self.asked += prompts
        return [Answered("", "", prompt.ids, "", (self.age,) * self._words, "stop") for prompt in prompts]


def test_the_student_answers_anew_every_few_steps() -> None:
    student = Student()
    prompts = [Encoded(prompt=None, ids=(index,)) for index in range(40)]
    course = RolloutCourse(prompts, student.answer, texts, size=4, refresh=3, seed=0)
    ages = [course.next().answers[0].answer_ids[0] for _ in range(7)]
    assert ages == [1, 1, 1, 2, 2, 2, 3]
    assert len({prompt.ids for prompt in student.asked}) == 36


def test_every_rollout_is_learnt_from_once() -> None:
    prompts = [Encoded(prompt=None, ids=(index,)) for index in range(12)]
    course = RolloutCourse(prompts, Student().answer, texts, size=4, refresh=3, seed=0)
    lessons = [course.next() for _ in range(3)]
    assert [len(lesson.answers) for lesson in lessons] == [4, 4, 4]
    assert {answer.prompt_ids for lesson in lessons for answer in lesson.answers} == {p.ids for p in prompts}


def test_a_target_belongs_to_its_answer(seen: tuple) -> None:
    lesson = distributions(*seen, None, 1.0)
    part = lesson.rows([7, 2])
    assert part.answers == [lesson.answers[7], lesson.answers[2]]
    assert torch.equal(part.targets[1].hidden_ND, lesson.targets[2].hidden_ND)
