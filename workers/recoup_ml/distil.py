"""The distil stage: the student learns from a lesson a step, phase after phase.

What it learns from is the plan's choice: the teacher's distributions on the teacher's answers
(off-policy; QAD, arXiv 2601.20088), on the student's own answers (on-policy; GKD, arXiv
2306.13649), the one and then the other (arXiv 2604.15794), those of a teacher that is shown the
reference answer (self-demonstration; arXiv 2601.19897), or texts by cross-entropy. The teacher is
frozen, but where a healthy model is taught it may be the moving average of its own weights
(`moving_average.py`). The checkpoint is chosen by KL on validation prompts, never by training loss; where a
skill is taught, by that KL, which there is drift, and the loss on validation demonstrations together.

Prompts of `keep` enter every step with the damaged student's own distribution as their target, so
that the skill it was tuned for stays (two teachers, one for each kind of prompt).

It does not decide whether the student got better; `verdict.py` does, on other prompts.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Checkpoint, DamageReport, TrainingPoint, TrainingReport
from recoup_ml import answers, baselines, diagnose, durable, models, regulariser, skill
from recoup_ml.alignment import choose_positions, with_embeddings
from recoup_ml.lessons import Course, FixedCourse
from recoup_ml.moving_average import MovingAverage
from recoup_ml.observation import Observation, observe
from recoup_ml.plan import DATA, Data
from recoup_ml.regulariser import Regulariser
from recoup_ml.rollouts import Room, rollouts
from recoup_ml.run import Audience, Done, Journal, Run
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered, encode
from recoup_ml.snapshots import Snapshots
from recoup_ml.team import ALONE, Brief, Team, gather
from recoup_ml.trainable import prepare
from recoup_ml.training import Taught, Training, Watchers
from recoup_ml.trajectory import MOST_POSITIONS, Recorder

BEST, START = "best", "start"


def distil(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with what was tried without training, the training report and the `best` student."""
    plan = answers.read_plan(done)
    trials = baselines.try_all(run, journal, done, folder)
    if plan.method in DATA:
        brief = Brief(run, done, folder)
        with gather(brief) as team:
            train(brief, journal, team)
    elif trials.best:
        baselines.save(run, done, plan, trials.best, folder, folder / BEST)


def read(done: Done) -> TrainingReport | None:
    """The training report; none for a training-free method."""
    place = done["distil"] / "training.json"
    return TrainingReport.model_validate_json(place.read_text()) if place.exists() else None


def best(done: Done) -> Path | None:
    """The folder of the best student; none if nothing was done or nothing finite came of it."""
    folder = done["distil"] / BEST if "distil" in done else None
    return folder if folder and folder.exists() else None


def train(brief: Brief, audience: Audience, team: Team = ALONE) -> None:
    """This process's part of the training; the leader leaves the report and the best student."""
    run, done, folder = brief.run, brief.done, brief.folder
    plan, trials = answers.read_plan(done), baselines.tried(folder)
    tokenizer = models.load_tokenizer(run.teacher)
    pad_id = models.pad_id(tokenizer)
    validation, teacher = answers.answered(done, "validation")
    diagnosis = diagnose.read(done)

    def validate(student: PreTrainedModel) -> float:
        return compare(teacher, observe(student, validation, pad_id), validation).mean_kl

    def tell(point: TrainingPoint | Checkpoint) -> None:
        audience.progress(point.step, plan.steps, "steps")
        if isinstance(point, TrainingPoint):
            audience.metric(name="train", **point.model_dump())
        else:
            skill_loss = {} if point.skill_loss is None else {"skill_loss": point.skill_loss}
            audience.metric(name="validation", step=point.step, kl=point.validation_kl, **skill_loss)

    recorder = _recorder(run, validation, teacher, pad_id, diagnosis.damage)
    start = baselines.start(run, done, plan, trials, folder)
    if start.peft and team.leads:
        start.peft.save_pretrained(folder / START)  # for whoever repeats the training
    taught = _taught(run, tokenizer, start.model, team)
    distances = diagnosis.damage.distance_by_layer
    trainee = prepare(start.model, plan.trainable, distances, run.request.seed, start.peft)
    average = None if plan.ema_rate is None else MovingAverage(trainee, plan.ema_rate)
    watchers = Watchers(validate, diagnosis.floor.mean_kl, tell, recorder, taught)
    stops = run.request.training.stop_early
    unfinished = folder / durable.UNFINISHED
    training = Training(
        trainee,
        plan,
        pad_id,
        watchers,
        trials.student_kl,
        stops,
        unfinished / BEST,
        repaired=start.name != "student",
        snapshots=Snapshots(unfinished, audience.stopping),
        regulariser=_regulariser(run, diagnosis.damage),
        halvings=run.halvings,
        team=team,
        average=average,
    )
    keep = answers.kept(done, plan)
    if keep:
        training.keep(FixedCourse(keep, plan.batch_size, run.request.seed))
    room = Room(run, plan, trainee, tokenizer, unfinished, team, average)
    training.take_up()
    for phase in training.left():
        with ExitStack() as ends:
            training.run(phase, _course(done, phase.data, room, start.fitted, ends))
    if not team.leads:
        return
    audience.progress(plan.steps, plan.steps, "steps")
    report = training.report(
        start.name, start.fitted, len(keep.answers) if keep else 0, answers.rewrite_counts(done)
    )
    (folder / "training.json").write_text(report.model_dump_json())
    audience.metric(name="tokens", trained=report.tokens)
    if (unfinished / BEST).exists():
        shutil.copytree(unfinished / BEST, folder / BEST, copy_function=durable.link)


def _taught(
    run: Run, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, team: Team
) -> Taught | None:
    shown = skill.validation(run, tokenizer)
    return shown and Taught(team.told(shown.loss(student) if team.leads else None), shown.loss)


def _recorder(
    run: Run, validation: Sequence[Answered], teacher: Observation, pad_id: int, damage: DamageReport
) -> Recorder | None:
    """Who measures alignment along the way, if the request asks for it; the teacher is run once for it."""
    every = run.request.alignment.every_steps
    if every is None:
        return None
    total = min(run.request.alignment.positions, MOST_POSITIONS)
    positions = choose_positions(validation, total, run.request.seed)
    states = observe(models.load(run.teacher), validation, pad_id, positions).states
    models.release()
    layer_map = with_embeddings(damage.layer_map)
    return Recorder(every, validation, replace(teacher, states=states), positions, layer_map, pad_id)


def _regulariser(run: Run, damage: DamageReport) -> Regulariser | None:
    """The teacher beside the student, if the request weighs how alike their hidden states are."""
    spec = run.request.alignment
    if not regulariser.wanted(spec):
        return None
    layer_map = regulariser.compared(spec, damage.layer_map)
    return Regulariser(models.load(run.teacher), layer_map, spec.weight, spec.hidden_weight)


def _course(done: Done, data: Data, room: Room, fitted: int, ends: ExitStack) -> Course:
    run, plan = room.run, room.plan
    if data == "teacher":
        lesson = answers.taught(done, plan)
        return FixedCourse(lesson.rows(range(fitted, len(lesson.answers))), plan.batch_size, run.request.seed)
    if data == "student":
        asked = encode(diagnose.split_prompts(run).train, room.tokenizer, run.prompt_tokens)
        return rollouts(room, asked, {}, ends)
    if data == "demonstrated":
        return rollouts(room, *answers.demonstrations(run, room.tokenizer), ends)
    return FixedCourse(answers.written(done), plan.batch_size, run.request.seed)
