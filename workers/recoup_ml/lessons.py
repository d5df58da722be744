"""What a student learns from: answers, and for every answer position what it should have said.

A lesson is fixed (a stage left it: the teacher answered, or references were rewritten) or made
while training goes on (the student answers, the teacher says what it would have said). A course
hands out a lesson a step, whichever it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from recoup.schemas import RolloutReport
from recoup_ml import models
from recoup_ml.mismatch import Mismatch
from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered, Encoded, from_row
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
    """A lesson on the whole distributions of a teacher that was observed on `answers`, or on their top.

    The teacher's head lies where the student is, so that it is moved once and not for every batch.
    """
    if top_k is None:
        head = teacher.head.on(models.device())
        return Lesson(answers, [Hidden(hidden_ND, head) for hidden_ND in teacher.hidden])
    return Lesson(answers, likeliest(teacher, top_k, temperature))


@torch.no_grad()
def likeliest(teacher: Observation, top_k: int, temperature: float) -> list[TopK]:
    """The top of the distributions of a teacher that was observed, answer by answer."""
    weight_VD = teacher.head.weight_VD
    logits = (teacher.head(hidden_ND.to(weight_VD)) for hidden_ND in teacher.hidden)
    return [TopK.of(logits_NV, top_k, temperature).compact() for logits_NV in logits]


def texts(answers: Sequence[Answered]) -> Lesson:
    """A lesson on the answers' own tokens: cross-entropy."""
    return Lesson(answers, [Tokens(torch.tensor(answer.answer_ids)) for answer in answers])


class Course(Protocol):
    def next(self) -> Lesson:
        """The lesson of the next step."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the course is, as plain JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a new course, made alike, to where another one was."""
        ...

    def rollouts(self) -> RolloutReport | None:
        """What servers drew of it; none where none did."""
        ...


class FixedCourse:
    """`size` answers of one lesson a step; each once before any comes again."""

    def __init__(self, lesson: Lesson, size: int, seed: int) -> None:
        self._lesson = lesson
        self._draws, self._drawn = draws(len(lesson.answers), size, seed), 0

    def next(self) -> Lesson:
        self._drawn += 1
        return self._lesson.rows(next(self._draws))

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        skip(self._draws, self._drawn)

    def rollouts(self) -> None:
        return None


class RolloutCourse:
    """The student as it is answers a few steps' prompts; the teacher is observed on the answers.

    On-policy distillation (GKD, arXiv 2306.13649, λ = 1). A teacher that stays as it is says at once what it
    has to say of all these answers, one that moves says it at the step that learns from it.

    Args:
        answer: the present student's answers to prompts.
        teach: the lesson that the teacher makes of answers.
        refresh: for how many steps the student answers at once.
        moving: whether the teacher is another one at every step.
    """

    def __init__(
        self,
        prompts: Sequence[Encoded],
        answer: Callable[[Sequence[Encoded]], Sequence[Answered]],
        teach: Callable[[Sequence[Answered]], Lesson],
        size: int,
        refresh: int,
        seed: int,
        moving: bool = False,
    ) -> None:
        self._prompts, self._answer, self._teach = prompts, answer, teach
        self._refresh, self._moving = refresh, moving
        self._draws, self._drawn = draws(len(prompts), size * refresh, seed), 0
        self._answers: Sequence[Answered] = []
        self._ready: list[Callable[[], Lesson]] = []
        self._mismatch = Mismatch()

    def next(self) -> Lesson:
        if not self._ready:
            self._answers = self._answer([self._prompts[row] for row in next(self._draws)])
            self._drawn += 1
            self._mismatch += Mismatch.of(answer.drift for answer in self._answers if answer.drift)
            self._ready = self._lessons()
        return self._ready.pop(0)()

    def state(self) -> dict[str, Any]:
        """Answers are kept, being those of a student that is gone.

        What a teacher said of them is not: one that stays would say it again, one that moves has yet to.
        """
        answers = [asdict(answer) for answer in self._answers] if self._ready else []
        ready, mismatch = len(self._ready), asdict(self._mismatch)
        return {"drawn": self._drawn, "answers": answers, "ready": ready, "mismatch": mismatch}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        skip(self._draws, self._drawn)
        self._answers = [from_row(row) for row in state["answers"]]
        self._mismatch = Mismatch(**state["mismatch"])
        self._ready = self._lessons()[-state["ready"] :] if state["ready"] else []

    def rollouts(self) -> RolloutReport | None:
        return self._mismatch.report()

    def _lessons(self) -> list[Callable[[], Lesson]]:
        steps = min(self._refresh, len(self._answers))
        if self._moving:
            return [partial(self._teach, self._answers[step::steps]) for step in range(steps)]
        lesson = self._teach(self._answers)
        return [partial(lesson.rows, range(step, len(self._answers), steps)) for step in range(steps)]


def draws(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """For ever, `size` of the numbers below `count`; each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while True:
        while len(rows) < size:
            rows += torch.randperm(count, generator=generator).tolist()
        yield rows[:size]
        rows = rows[size:]


def skip(drawn: Iterator[list[int]], times: int) -> None:
    """Draws so often for nobody."""
    for _ in range(times):
        next(drawn)
