"""The training loop: a lesson a step, phase after phase, checkpoints chosen on validation.

What is learnt comes from a course (`lessons.py`), what trains is the trainee's business
(`trainable.py`), when to stop is `stopping.py`'s, how a killed training finds back to where it was
is `snapshots.py`'s. This file owns the order of things.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from recoup.schemas import Checkpoint, PhaseReport, RewriteCounts, Stopped, TrainingPoint, TrainingReport
from recoup_ml import durable, mismatch
from recoup_ml.fused import hidden_divergence
from recoup_ml.lessons import Course, Lesson
from recoup_ml.models import can_pack, can_share, head, last_hidden
from recoup_ml.moving_average import MovingAverage
from recoup_ml.objective import Divergence
from recoup_ml.plan import Phase, Plan
from recoup_ml.regulariser import Regulariser
from recoup_ml.room import Shape, free_bytes, room_for
from recoup_ml.run import Interrupted
from recoup_ml.sequences import Answered, Batch, batches, packs, shared_tokens
from recoup_ml.snapshots import Snapshot, Snapshots, dice, moments, restore_dice, restore_moments
from recoup_ml.stopping import PATIENCE, reason_to_stop
from recoup_ml.targets import join
from recoup_ml.team import ALONE, Team
from recoup_ml.trainable import Trainee
from recoup_ml.trajectory import Recorder

WARMUP_SHARE, FINAL_SHARE = 0.1, 0.1
MAX_GRADIENT_NORM = 1.0
VALIDATIONS, FEWEST_VALIDATIONS, STEPS_BETWEEN = 8, 4, 6


@dataclass(frozen=True)
class Taught:
    """A skill that is taught, on validation demonstrations."""

    before: float
    """Loss of the student before anything was done to it, nats a token."""
    loss: Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Look:
    """What a student was seen to do on validation, nats a token."""

    kl: float
    skill_loss: float | None = None
    """None where no skill is taught."""

    @property
    def cost(self) -> float:
        """What chooses the checkpoint: ability and new skill count alike."""
        return self.kl + (self.skill_loss or 0.0)

    @staticmethod
    def at(point: Checkpoint) -> "Look":
        return Look(math.inf if point.validation_kl is None else point.validation_kl, point.skill_loss)


@dataclass(frozen=True)
class Watchers:
    """Who looks on while a student trains."""

    validate: Callable[[PreTrainedModel], float]
    """Mean token KL of the model on validation prompts, nats."""
    floor: float
    """Of the teacher to itself after rounding, nats."""
    tell: Callable[[TrainingPoint | Checkpoint], None]
    recorder: Recorder | None = None
    """Looks in place of `validate` where alignment is measured along the way."""
    taught: Taught | None = None


@dataclass(frozen=True)
class Position:
    """Where training stands in its present phase, at the end of a step."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: Stopped | None = None
    """Why the phase is over before its last step."""


@dataclass
class Training:
    """A student that is being trained: the optimizer, and all that was seen on the way.

    `best` holds the checkpoint with the lowest validation KL or, where a skill is taught, the lowest sum of
    KL and loss; it stays absent if training diverged before any was finite. With `snapshots`, a training that
    was killed can be taken up where it was.
    """

    trainee: Trainee
    plan: Plan
    pad_id: int
    watchers: Watchers
    before: float
    """Validation KL of the student before anything was done to it, nats."""
    stops_early: bool
    best: Path
    repaired: bool = False
    """Whether it starts from a repair, which is then the first checkpoint: training may make it worse."""
    snapshots: Snapshots | None = None
    regulariser: Regulariser | None = None
    """Acts on what is learnt from the teacher, not on `keep`."""
    halvings: int = 0
    """How often the tokens that go through the student at once are halved."""
    team: Team = ALONE
    """With whom this process trains; the leader alone looks, tells and writes."""
    average: MovingAverage | None = None
    """Of the trainee, if that is its teacher; each process has its own, and all have the same."""
    _keep: Course | None = None
    _curve: list[TrainingPoint] = field(default_factory=list)
    _checkpoints: list[Checkpoint] = field(default_factory=list)
    _phases: list[PhaseReport] = field(default_factory=list)
    _resumed: Snapshot | None = None
    """What the next phase to be run goes on from."""

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(
            self.trainee.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.trainee.model.eval()
        self._packs = can_pack(self.trainee.model)
        self._shares = self._packs and can_share(self.trainee.model)

    def keep(self, course: Course) -> None:
        """Adds a lesson of this course to every step; its mean divergence counts as much as the other's."""
        self._keep = course

    def take_up(self) -> None:
        """Goes back to the newest snapshot, if there is one: what is still `left` is to be run."""
        if (found := self.snapshots and self.snapshots.newest()) is None:
            return
        with torch.no_grad():
            for name, weight in found.group("weights").items():
                self.trainee.named[name].copy_(weight)
        self.trainee.settle()
        restore_moments(self._optimizer, self.trainee.named, found.group("moments"))
        if self.average:
            self.average.restore(found.group("average"))
        self._curve = [TrainingPoint(**point) for point in found.state["curve"]]
        self._checkpoints = [Checkpoint(**point) for point in found.state["checkpoints"]]
        self._phases = [PhaseReport(**phase) for phase in found.state["phases"]]
        if self.watchers.recorder:
            self.watchers.recorder.restore(found.state["recorder"])
        self._resumed = found
        self._save_if_chosen()  # a crash between snapshot and checkpoint may have left an older one

    def left(self) -> tuple[Phase, ...]:
        """The plan's phases that are not over."""
        return self.plan.phases[len(self._phases) :]

    def run(self, phase: Phase, course: Course) -> None:
        """Takes the steps of a phase, fewer if validation says so.

        Raises:
            Interrupted: the run is to stop; a snapshot is kept.
        """
        courses = [course, *([self._keep] if self._keep else [])]
        at = self._go_on(courses)
        began, when = time.monotonic() - at.seconds, validation_steps(phase.steps)
        self._tokens = self._tokens_at_once()
        recorder = self.watchers.recorder
        if self.repaired and not self._curve:
            self._validate(phase)
            self._save_if_chosen()
        elif recorder and not self._curve:
            self._look()
        while at.stopped is None and at.step < phase.steps:
            lessons = [course.next() for course in courses]
            loss = self._step(lessons, phase.learning_rate * rate_share(at.step, phase.steps))
            if not math.isfinite(loss):
                at = replace(at, stopped="diverged")
                break
            tokens = at.tokens + sum(lesson.positions for lesson in lessons)
            validated = at.step + 1 in when
            reason = self._validate(phase) if validated else None
            if recorder and not validated and recorder.due(len(self._curve)):
                self._look()
            at = Position(at.step + 1, tokens, time.monotonic() - began, reason)
            self._keep_safe(at, courses, validated)
        self._phases.append(
            PhaseReport(
                data=phase.data,
                objective=self._objective(phase),
                learning_rate=phase.learning_rate,
                planned_steps=phase.steps,
                steps=at.step,
                tokens=at.tokens,
                seconds=time.monotonic() - began,
                stopped=at.stopped or "steps",
                rollouts=course.rollouts(),
            )
        )

    def report(
        self, started_from: str, fitted_answers: int, keep_answers: int, rewrites: RewriteCounts | None
    ) -> TrainingReport:
        return TrainingReport(
            method=self.plan.method,
            mode=self.trainee.kind,
            started_from=started_from,
            fitted_answers=fitted_answers,
            steps=len(self._curve),
            batch_size=self.plan.batch_size,
            phases=self._phases,
            trainable_parameters=sum(parameter.numel() for parameter in self.trainee.parameters),
            keep_answers=keep_answers,
            tokens=sum(phase.tokens for phase in self._phases),
            masked_weights=self.trainee.masked_weights,
            initial_validation_kl=self.before,
            initial_skill_loss=self.watchers.taught and self.watchers.taught.before,
            diverged=any(phase.stopped == "diverged" for phase in self._phases) or not self.best.exists(),
            rewrites=rewrites,
            curve=self._curve,
            checkpoints=self._checkpoints,
            trajectory=self.watchers.recorder and self.watchers.recorder.trajectory(),
        )

    def _objective(self, phase: Phase) -> str:
        texts = phase.data in {"rewrites", "references"}
        objective = "cross_entropy" if texts else str(self.plan.divergence)
        return f"{objective} + {self.regulariser}" if self.regulariser else objective

    def _step(self, lessons: Sequence[Lesson], rate: float) -> float:
        """One optimizer step on all lessons; returns the mean divergence of the first, nats a position."""
        self.trainee.model.train()
        mine = [self._learn(lessons[0], self.regulariser), *(self._learn(lesson) for lesson in lessons[1:])]
        losses = self.team.totals(mine)
        if not all(map(math.isfinite, losses)):
            self._optimizer.zero_grad(set_to_none=True)
            return math.nan
        self.team.add_gradients(self.trainee.parameters)
        self.trainee.mask_gradients()
        nn.utils.clip_grad_norm_(self.trainee.parameters, MAX_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.trainee.settle()
        if self.average:
            self.average.renew()
        self._curve.append(TrainingPoint(step=len(self._curve) + 1, loss=losses[0], learning_rate=rate))
        self.watchers.tell(self._curve[-1])
        return losses[0]

    def _learn(self, lesson: Lesson, regulariser: Regulariser | None = None) -> float:
        prompts = (answer.prompt_ids for answer in lesson.answers)
        shared = shared_tokens(prompts) if self._shares else 0
        share = shared - (-sum(len(answer) - shared for answer in lesson.answers) // self.team.size)
        tokens = min(self._tokens, share)
        pieces = (
            packs(lesson.answers, tokens, shared)
            if self._packs
            else batches(lesson.answers, self.pad_id, tokens)
        )
        mine = self.team.share([*pieces])
        return learn(self.trainee.model, lesson, self.plan.divergence, mine, regulariser)

    def _tokens_at_once(self) -> int:
        """Tokens that go through the student at once; the same for all processes, which share the pieces.

        Where few have room, the student's layers are run again on the way back from now on.
        """
        model, born = self.trainee.model, bool(self._optimizer.state)
        unborn = 0 if born else sum(weight.numel() for weight in self.trainee.parameters)
        room = room_for(
            free_bytes(model.device), Shape.of(model), unborn, may_recompute=self._may_recompute()
        )
        if room.recomputes:
            model.activation_checkpointing_enable()
        return min(self.team.gathered(room.tokens)) >> self.halvings

    def _may_recompute(self) -> bool:
        """A regulariser reads states where they pass; those of a second run would count twice."""
        return self.regulariser is None and self.trainee.model.supports_gradient_checkpointing

    def _validate(self, phase: Phase) -> Stopped | None:
        """Adds a checkpoint, marked as chosen if it is the best so far; says whether to stop."""
        seen = self._look()
        costs = [cost for point in self._checkpoints if math.isfinite(cost := Look.at(point).cost)]
        chosen = math.isfinite(seen.cost) and seen.cost < min(costs, default=math.inf)
        now = Checkpoint(
            step=len(self._curve),
            validation_kl=seen.kl if math.isfinite(seen.cost) else None,
            skill_loss=seen.skill_loss if math.isfinite(seen.cost) else None,
            chosen=chosen,
        )
        earlier = [
            point.model_copy(update={"chosen": point.chosen and not chosen}) for point in self._checkpoints
        ]
        self._checkpoints = [*earlier, now]
        self.watchers.tell(now)
        if not self.stops_early:
            return None
        patience = 1 if phase.probation else PATIENCE
        before = Look(self.before, self.watchers.taught and self.watchers.taught.before).cost
        return reason_to_stop(before, self.watchers.floor, [*costs, seen.cost], patience)

    def _look(self) -> Look:
        """The student as it is now, on validation."""
        if not self.team.leads:
            return Look(*self.team.told())
        model, recorder, taught = self.trainee.model.eval(), self.watchers.recorder, self.watchers.taught
        with parametrize.cached():
            kl = recorder.look(model, len(self._curve)) if recorder else self.watchers.validate(model)
            seen = Look(kl, taught and taught.loss(model))
        return Look(*self.team.told([seen.kl, seen.skill_loss]))

    def _go_on(self, courses: Sequence[Course]) -> Position:
        """Where the phase stands: at its start, or where a snapshot left it, courses and dice included."""
        found, self._resumed = self._resumed, None
        if found is None:
            return Position()
        for course, state in zip(courses, found.state["courses"], strict=True):
            course.restore(state)
        restore_dice(found.group("dice"), found.state["dice"])
        return Position(**found.state["position"])

    def _keep_safe(self, at: Position, courses: Sequence[Course], validated: bool) -> None:
        """Leaves on the disk, after a validation or when it is time, what a successor goes on from.

        The snapshot comes first: with it the checkpoint that was chosen can be saved again.
        """
        kept = self.snapshots
        stopping = bool(self.team.told(kept is not None and kept.stopping()))
        if kept and self.team.leads and (validated or stopping or kept.due()):
            kept.write(len(self._curve), self._snapshot(at, courses))
        if validated:
            self._save_if_chosen()
        if stopping:
            raise Interrupted

    def _save_if_chosen(self) -> None:
        """Saves the present weights as the best if validation chose them."""
        last = self._checkpoints[-1] if self._checkpoints else None
        if self.team.leads and last and last.chosen and last.step == len(self._curve):
            durable.place(self.best, self.trainee.save)

    def _snapshot(self, at: Position, courses: Sequence[Course]) -> Snapshot:
        rolled, rolled_here = dice()
        seen = {"curve": self._curve, "checkpoints": self._checkpoints, "phases": self._phases}
        return Snapshot.of(
            {
                "weights": {name: weight.detach() for name, weight in self.trainee.named.items()},
                "moments": moments(self._optimizer, self.trainee.named),
                "average": self.average.named if self.average else {},
                "dice": rolled,
            },
            {name: [item.model_dump() for item in items] for name, items in seen.items()}
            | {"position": asdict(at), "dice": rolled_here}
            | {"courses": [course.state() for course in courses]}
            | {"recorder": self.watchers.recorder and self.watchers.recorder.state()},
        )


def learn(
    student: PreTrainedModel,
    lesson: Lesson,
    divergence: Divergence,
    pieces: Iterable[Batch],
    regulariser: Regulariser | None = None,
) -> float:
    """Adds the gradient of the lesson's mean divergence over its positions; returns it, nats.

    The lesson's answers go through the student in `pieces`, one after another. The gradient of a
    `regulariser` is added, each piece by its share of the positions, and not its value to what is returned.
    """
    total = 0.0
    for piece in pieces:
        there = piece.to(student.device)
        with regulariser.beside(student, there) if regulariser else nullcontext() as terms:
            student_BTD = last_hidden(student, there.ids_BT, there.mask_BT, there.places_BT, there.sees_BTT)
        student_ND = student_BTD[there.answer_BT]
        target = join([lesson.targets[row] for row in piece.rows], student_ND)
        counted = [lesson.answers[row] for row in piece.rows]
        weights_N = torch.cat([_counts(answer, lesson.skip) for answer in counted]) / lesson.positions
        loss = hidden_divergence(
            student_ND, head(student), target, divergence, weights_N.to(student_ND.device)
        )
        (loss + terms() * float(weights_N.sum()) if terms else loss).backward()
        total += loss.item()
    return total


def _counts(answer: Answered, skip: int) -> torch.Tensor:
    """How much each position of an answer counts: 0 if it is skipped, else 1, or its importance weight."""
    counted = (torch.arange(len(answer.answer_ids)) >= skip).float()
    return counted if answer.drift is None else counted * torch.tensor(mismatch.weights(answer.drift))


def rate_share(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the rate."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def validation_steps(steps: int) -> set[int]:
    """After which steps to validate: four to eight times, the last step among them.

    In a short run every validation costs as much as a few steps.
    """
    times = min(VALIDATIONS, max(FEWEST_VALIDATIONS, steps // STEPS_BETWEEN))
    return {round(steps * part / times) for part in range(1, times + 1)} - {0}
