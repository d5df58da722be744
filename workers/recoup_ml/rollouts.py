"""Lessons on the student's own answers: it answers as it is, and the teacher says what it would have said.

Who answers for the student: servers that hold it, with the adapter of the moment (`served_student.py`),
or itself. Who speaks for the teacher: servers that score the answers, where the likeliest tokens are all
that is learnt, or the teacher beside the student. A student that is taught by its own moving average
scores its answers itself, with the average's weights.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerBase

from recoup_ml import models, tops
from recoup_ml.generate import LocalEngine, usable
from recoup_ml.lessons import Lesson, RolloutCourse, distributions
from recoup_ml.moving_average import MovingAverage
from recoup_ml.observation import observe
from recoup_ml.plan import Plan
from recoup_ml.repetition import without_loop
from recoup_ml.run import Run
from recoup_ml.sequences import Answered, Encoded, from_row
from recoup_ml.served_student import ServedStudent, drifted, serving
from recoup_ml.team import Team
from recoup_ml.trainable import Trainee
from recoup_ml.vllm_engine import VllmEngine

Draw = Callable[[Sequence[Encoded], int], Sequence[Answered]]
"""(prompts, limit) → what the student as it is answers."""


@dataclass(frozen=True)
class Room:
    """Where a student is taught."""

    run: Run
    plan: Plan
    trainee: Trainee
    tokenizer: PreTrainedTokenizerBase
    unfinished: Path
    """The folder of the stage for what is on the way."""
    team: Team
    average: MovingAverage | None = None
    """Of the trainee, if that is its teacher."""


def rollouts(
    room: Room,
    prompts: Sequence[Encoded],
    shown: Mapping[tuple[int, ...], tuple[int, ...]],
    ends: ExitStack,
) -> RolloutCourse:
    """The student's answers to `prompts`, taught by the teacher.

    Args:
        shown: the prompts that the teacher sees instead, by the student's.
        ends: is closed when the course is over.
    """
    request, plan = room.run.request, room.plan
    spec, draw = request.method.rollouts, _draw(room, ends)
    lesson = _by_average(room, room.average) if room.average else _lessons(room)
    limit = request.generation.max_new_tokens if spec.max_new_tokens == "auto" else spec.max_new_tokens

    def answer(asked: Sequence[Encoded]) -> Sequence[Answered]:
        return [_without_loop(item) for item in usable(draw(asked, limit))]

    def teach(given: Sequence[Answered]) -> Lesson:
        heard = [replace(item, prompt_ids=shown.get(item.prompt_ids, item.prompt_ids)) for item in given]
        return Lesson(given, lesson(heard).targets, spec.skip_tokens)

    moving = room.average is not None
    return RolloutCourse(prompts, answer, teach, plan.batch_size, spec.refresh_steps, request.seed, moving)


def _draw(room: Room, ends: ExitStack) -> Draw:
    """Servers of the student, where its adapter can be served; else the student itself.

    Whole models, masked and weight-decomposed adapters, ranks by damage, and other temperatures than 1, at
    which servers do not tell log-probabilities, stay here.
    """
    run, trainee = room.run, room.trainee
    temperature = run.request.method.rollouts.temperature
    plain = trainee.kind == "lora" and not room.plan.trainable.by_damage and temperature == 1
    urls = serving(run.rollout_urls, run.student, run.request.student.source) if plain else []
    if not urls:
        return _drawn_here(room, LocalEngine(trainee.model, room.tokenizer, temperature))
    if not room.team.leads:
        return lambda _asked, _limit: [from_row(row) for row in room.team.told()]
    served = ServedStudent(urls, room.unfinished / "rollouts", room.tokenizer)
    ends.callback(served.withdraw)
    dice = random.Random(run.request.seed)

    def draw(asked: Sequence[Encoded], limit: int) -> list[Answered]:
        served.publish(trainee.save)
        given = served.answer(asked, limit, dice.getrandbits(31))
        pad_id = models.pad_id(room.tokenizer)
        seen = observe(trainee.model.eval(), [item for item, _ in given], pad_id)
        rows = [asdict(item) for item in drifted(given, seen)]
        return [from_row(row) for row in room.team.told(rows)]

    return draw


def _drawn_here(room: Room, engine: LocalEngine) -> Draw:
    """Each process of the team has the student answer a share of the prompts."""
    team, student = room.team, room.trainee.model

    def draw(asked: Sequence[Encoded], limit: int) -> list[Answered]:
        student.eval()
        with parametrize.cached():
            mine = engine.answer(team.share(asked), limit, lambda _done: None)
        shares = team.gathered([asdict(item) for item in mine])
        return [from_row(shares[place % team.size][place // team.size]) for place in range(len(asked))]

    return draw


def _lessons(room: Room) -> Callable[[Sequence[Answered]], Lesson]:
    """What the teacher makes of answers: where its servers know all that is learnt, it is not in memory.

    They do not know what is likely at another temperature than 1, and where they take turns with this
    process they are gone. Each process of the team asks for a share.
    """
    run, tokenizer, team = room.run, room.tokenizer, room.team
    top_k, temperature = room.plan.top_k, room.plan.divergence.temperature
    if run.vllm_urls and not run.vllm_command and top_k is not None and temperature == 1:
        servers = VllmEngine(run.vllm_urls, tokenizer)

        def asked(heard: Sequence[Answered]) -> Lesson:
            mine = [tops.packed(top) for top in servers.tops(team.share(heard), top_k)]
            shares = team.gathered([content.hex() for content in mine])
            contents = (shares[place % team.size][place // team.size] for place in range(len(heard)))
            return Lesson(heard, [tops.unpacked(bytes.fromhex(content)) for content in contents])

        return asked
    teacher, pad_id = models.load(run.teacher), models.pad_id(tokenizer)
    return lambda heard: distributions(heard, observe(teacher, heard, pad_id), top_k, temperature)


def _by_average(room: Room, average: MovingAverage) -> Callable[[Sequence[Answered]], Lesson]:
    """What the average of the student's weights, as it is now, makes of answers."""
    plan, pad_id = room.plan, models.pad_id(room.tokenizer)

    def scored(heard: Sequence[Answered]) -> Lesson:
        with average.in_place() as student, parametrize.cached():
            seen = replace(observe(student.eval(), heard, pad_id), head=models.head(student).kept())
            return distributions(heard, seen, plan.top_k, plan.divergence.temperature)

    return scored


def _without_loop(given: Answered) -> Answered:
    """An answer that fell into repetition, cut there (ShortOPD, arXiv 2607.13124)."""
    ids = tuple(without_loop(given.answer_ids))
    if len(ids) == len(given.answer_ids):
        return given
    return replace(given, answer_ids=ids, finish="length", drift=given.drift and given.drift[: len(ids)])
