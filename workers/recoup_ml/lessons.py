"""What a student learns from: answers, and for every answer position what it should have said.

A lesson is fixed (a stage left it: the teacher answered, or references were rewritten) or made
while training goes on (the student answers, the teacher says what it would have said). A course
hands out a lesson a step, whichever it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.targets import Hidden, Target, Tokens, TopK


@dataclass(frozen=True)
class Lesson:
    answers: Sequence[Answered]
    targets: Sequence[Target]
    """For each answer, what to match at each of its positions."""
    skip: int = 0
    """First positions of every answer that do not count."""

    @property
    def positions(self) -> int:
        """How many positions count."""
        return sum(max(0, len(answer.answer_ids) - self.skip) for answer in self.answers)

    def rows(self, chosen: Sequence[int]) -> "Lesson":
        return replace(
            self, answers=[self.answers[row] for row in chosen], targets=[self.targets[row] for row in chosen]
        )


def distributions(
    answers: Sequence[Answered], teacher: Observation, top_k: int | None, temperature: float
) -> Lesson:
    """A lesson on the whole distributions of a teacher that was observed on `answers`, or on their top."""
    if top_k is None:
        return Lesson(answers, [Hidden(hidden_ND, teacher.head) for hidden_ND in teacher.hidden])
    weight_VD = teacher.head.weight_VD
    with torch.no_grad():
        tops = [
            TopK.of(teacher.head(hidden_ND.to(weight_VD)), top_k, temperature) for hidden_ND in teacher.hidden
        ]
    return Lesson(answers, tops)


def texts(answers: Sequence[Answered]) -> Lesson:
    """A lesson on the answers' own tokens: cross-entropy."""
    return Lesson(answers, [Tokens(torch.tensor(answer.answer_ids)) for answer in answers])


class Course(Protocol):
    def next(self) -> Lesson:
        """The lesson of the next step."""
        ...


class FixedCourse:
    """`size` answers of one lesson a step; each once before any comes again."""

    def __init__(self, lesson: Lesson, size: int, seed: int) -> None:
        self._lesson = lesson
        self._draws = draws(len(lesson.answers), size, seed)

    def next(self) -> Lesson:
        return self._lesson.rows(next(self._draws))


class RolloutCourse:
    """The student as it is answers a few steps' prompts; the teacher is observed on the answers.

    On-policy distillation (GKD, arXiv 2306.13649, λ = 1).

    Args:
        answer: the present student's answers to prompts.
        teach: the lesson that the teacher makes of answers.
        refresh: for how many steps the student answers at once.
    """

    def __init__(
        self,
        prompts: Sequence[Encoded],
        answer: Callable[[Sequence[Encoded]], Sequence[Answered]],
        teach: Callable[[Sequence[Answered]], Lesson],
        size: int,
        refresh: int,
        seed: int,
    ) -> None:
        self._prompts, self._answer, self._teach = prompts, answer, teach
        self._size, self._refresh = size, refresh
        self._draws = draws(len(prompts), size * refresh, seed)
        self._ready: list[Lesson] = []

    def next(self) -> Lesson:
        if not self._ready:
            self._ready = list(self._answered())
        return self._ready.pop(0)

    def _answered(self) -> Iterator[Lesson]:
        answers = self._answer([self._prompts[row] for row in next(self._draws)])
        lesson = self._teach(answers)
        steps = min(self._refresh, len(answers))
        for step in range(steps):
            yield lesson.rows(range(step, len(answers), steps))


def draws(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """For ever, `size` of the numbers below `count`; each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while True:
        while len(rows) < size:
            rows += torch.randperm(count, generator=generator).tolist()
        yield rows[:size]
        rows = rows[size:]
