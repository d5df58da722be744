"""Training-free repairs in a recovery: tried on validation, and the best one measured beside the student.

What costs nothing must be beaten before training may be called worth its price. Repairs see
the teacher's answers to training prompts; validation chooses among them, test judges the best.
A repair that wears a new skill away is no rival, so where there is one to keep, its distance from
the student on `keep` counts as much as the distance from the teacher, as it does in training.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from recoup.schemas import TriedRepair
from recoup_ml import answers, diagnose, durable, models, packed, repair, results
from recoup_ml.errors import IncompatibleModels, UnsupportedModel
from recoup_ml.observation import observe
from recoup_ml.plan import DATA, Plan
from recoup_ml.repair import Fit, Repair
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.scores import compare
from recoup_ml.stream import calibrated

FILE, FITS = "repairs.json", "fits"


@dataclass(frozen=True)
class Tried:
    repair: Repair
    validation_kl: float
    """Mean token KL(teacher‖repaired), nats; infinity if any was not finite."""
    keep_kl: float
    """Mean token KL(student‖repaired) on prompts of `keep`, nats; 0 where there are none."""
    seconds: float
    problem: str | None = None
    """Why it could not be done."""

    @property
    def cost(self) -> float:
        """What is chosen by: what training makes small, ability and new skill counting alike."""
        return self.validation_kl + self.keep_kl


@dataclass(frozen=True)
class Trials:
    student_kl: float
    """Of the student as it is, on the same validation prompts."""
    tried: list[Tried]
    """Best first."""

    @property
    def best(self) -> Repair | None:
        """The repair that validation chose; none if none was finite."""
        return self.tried[0].repair if self.tried and math.isfinite(self.tried[0].cost) else None

    @property
    def better(self) -> Repair | None:
        """The best repair, if it is nearer to the teacher than the student as it is."""
        return self.best if self.best and self.tried[0].cost < self.student_kl else None


@dataclass(frozen=True)
class Start:
    """The model that training starts from."""

    model: PreTrainedModel
    peft: PeftModel | None
    """An adapter inside the model that training goes on with."""
    name: str
    fitted: int = 0
    """To how many of the teacher's first answers it was fitted, so closely that training leaves them out.

    0 where too few others would be left, or something else is learnt.
    """


def try_all(run: Run, journal: Journal, done: Done, folder: Path) -> Trials:
    """Leaves in `folder` how the student and every repair that is to be tried did, and returns it.

    Beside it lies what was fitted for them.
    """
    unfinished = folder / durable.UNFINISHED
    kept = unfinished / FILE
    if not kept.exists():
        trials = _try_all(run, journal, done, unfinished / FITS)
        durable.place(kept, lambda aside: results.write(aside, trials))
    shutil.copy(kept, folder / FILE)
    if (unfinished / FITS).exists():
        shutil.copytree(unfinished / FITS, folder / FITS, copy_function=durable.link)
    return tried(folder)


def tried(folder: Path) -> Trials:
    """What `try_all` left in a folder."""
    return results.read(folder / FILE, Trials)


def _try_all(run: Run, journal: Journal, done: Done, fits: Path) -> Trials:
    plan = answers.read_plan(done)
    pad_id = models.pad_id(models.load_tokenizer(run.teacher))

    def distance(part: answers.Seen, model: PreTrainedModel) -> float:
        given, giver = answers.answered(done, part)
        return compare(giver, observe(model, given, pad_id), given).mean_kl

    student_kl, found = distance("validation", models.load(run.student)), []
    candidates = _candidates(run, plan)
    counted = Counter(journal, len(candidates), "repairs").part(len(candidates))
    for count, candidate in enumerate(candidates, start=1):
        models.release()
        began = time.monotonic()
        try:
            model = repaired(run, done, candidate, fits)
        except (IncompatibleModels, UnsupportedModel) as error:
            if plan.method not in DATA:
                raise
            found.append(Tried(candidate, math.inf, math.inf, time.monotonic() - began, str(error)))
            continue
        seconds = time.monotonic() - began
        keep_kl = distance("keep", model) if answers.has_keep(done) else 0.0
        found.append(Tried(candidate, distance("validation", model), keep_kl, seconds))
        del model
        counted(count)
    models.release()
    return Trials(student_kl, sorted(found, key=lambda item: item.cost))


def read(done: Done) -> Trials | None:
    """What was tried; nothing where nothing was needed."""
    return tried(done["distil"]) if "distil" in done else None


def start(run: Run, done: Done, plan: Plan, trials: Trials, folder: Path) -> Start:
    """The student, or its best repair where the plan wants that and it is nearer to the teacher.

    `folder` is where `try_all` left things.

    An adapter belongs to the student as it is, so only a repair that is an adapter itself can be
    what training one starts from.
    """
    chosen = trials.better if plan.start == "repair" else None
    if chosen and chosen.name == "low_rank_patch" and plan.trainable.mode == "lora":
        model = models.load(run.student)
        fitting = replace(chosen, strength=plan.trainable.rank)
        return Start(model, _as_adapter(run, done, fitting, model, folder / FITS), fitting.label)
    if chosen and plan.trainable.saves_model:
        model = repaired(run, done, chosen, folder / FITS)
        learnt = chosen.name == "reconstruct" and plan.answers("teacher")
        return Start(model, None, chosen.label, _fitted(done) if learnt else 0)
    return Start(models.load(run.student), None, "student")


def _fitted(done: Done) -> int:
    texts = answers.training_answers(done)
    fitted = calibrated(texts)
    return fitted if len(texts) - fitted > fitted else 0


def shown(done: Done) -> list[TriedRepair]:
    """What was tried, as the report shows it."""
    trials = read(done)
    return [
        TriedRepair(
            name=item.repair.name,
            label=item.repair.label,
            validation_kl=_finite(item.validation_kl),
            keep_kl=_finite(item.keep_kl) if answers.has_keep(done) else None,
            seconds=item.seconds,
            problem=item.problem,
        )
        for item in (trials.tried if trials else [])
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def repaired(run: Run, done: Done, chosen: Repair, fits: Path) -> PreTrainedModel:
    """The student with a repair applied; what is fitted for it is looked for, and kept, in `fits`."""
    found, model = _fit(run, done, chosen, fits), models.load(run.student)
    repair.apply(chosen, model, run.teacher, diagnose.read(done).damage, found)
    return model


def save(run: Run, done: Done, plan: Plan, chosen: Repair, folder: Path, target: Path) -> None:
    """Writes the repaired student to `target`: a whole model, or an adapter where planned.

    `folder` is where `try_all` left things.
    """
    if plan.output == "merged" and not packed.method(run.student):
        repaired(run, done, chosen, folder / FITS).save_pretrained(target)
    else:
        student = models.load(run.student)
        _as_adapter(run, done, chosen, student, folder / FITS).save_pretrained(target)


def _as_adapter(run: Run, done: Done, chosen: Repair, model: PreTrainedModel, fits: Path) -> PeftModel:
    return repair.as_adapter(model, _fit(run, done, chosen, fits))


def _fit(run: Run, done: Done, chosen: Repair, fits: Path) -> Fit:
    if chosen.name not in repair.FITTED:
        return {}
    place = fits / f"{chosen.name}-{chosen.strength:g}.safetensors"
    if not place.exists():
        texts, pad_id = answers.training_answers(done), models.pad_id(models.load_tokenizer(run.teacher))
        damage, model = diagnose.read(done).damage, models.load(run.student)
        found = repair.fit(chosen, model, run.teacher, damage, texts, pad_id)
        durable.place(place, lambda aside: save_file(found, aside))
        del model
        models.release()
    return load_file(place)


def _candidates(run: Run, plan: Plan) -> list[Repair]:
    if run.teaches:  # nothing is damaged
        return []
    found = repair.candidates(plan.damage)
    if plan.method not in DATA:
        return [candidate for candidate in found if candidate.name == plan.method]
    return found if run.request.evaluation.baselines or plan.start == "repair" else []
