"""A recovery's training as a plain script, for whoever wants to repeat or change it without Recoup.

`recipe.py.jinja` holds all that a script may need; only the parts that the run needed are written.
It computes what the training loop computes, in the same order and with the same seeds, but plainly:
the teacher stands beside the student, one answer goes through at a time, nothing is cached. Names
and sentences from outside enter it as JSON strings, which are Python's too, or as comments.

What a repair without training did has no script.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import fill
from typing import Any, Final, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from recoup.schemas import CreateRecovery, Report, TrainingReport
from recoup_ml import regulariser
from recoup_ml.page import day
from recoup_ml.plan import Data, Plan
from recoup_ml.trainable import ranks

Start = Literal["student", "adapter", "repaired"]
"""What training began with: the student, an adapter on it that a repair left, or a repaired student."""

COLUMNS: Final = 100
FILES: Final = "`--data` names the folder of the recovery's files, as `recoup download` makes it."
STARTS: Final[dict[Start, str]] = {
    "student": "",
    "adapter": "Training goes on with the adapter in `start/`, which a repair without training left.",
    "repaired": "`--start` names the student after the repair below, as a recovery by that method leaves it.",
}
LESSONS: Final[dict[Data, str]] = {
    "teacher": "The student learns the teacher's distribution on the teacher's answers, `rewrites.jsonl`.",
    "student": "The student learns the teacher's distribution on its own answers to `prompts.jsonl`.",
    "demonstrated": "The student learns, on its own answers to `prompts.jsonl`, the distribution of a "
    "teacher that is shown the reference answer.",
    "rewrites": "The student learns reference answers in the teacher's words, `texts.jsonl`.",
    "references": "The student learns reference answers as they are, `texts.jsonl`.",
}
AVERAGED: Final = "This teacher is the moving average of the student's own weights."
WHOLE: Final = "Of these it learns the prompts, too, but for the tokens with which all begin."
OTHERS: Final = "The first of them, to which the repair was fitted, are left out."
KEEPS: Final = "On the prompts of `keep.jsonl` it holds on to the distribution that it had before."
ENDS: Final = "Recoup kept the checkpoint that was best on validation prompts: there this ends."
DIVERGED: Final = "In Recoup this training diverged, and no checkpoint was kept."
PULLED: Final = (
    "Recoup's loss also had the terms of `alignment` that pull hidden states towards the teacher's; this "
    "script leaves them out, so it does not repeat the training exactly."
)
FORMULAS: Final = {
    "forward_kl": "KL(p ‖ q)",
    "reverse_kl": "KL(q ‖ p)",
    "jsd": "β KL(p ‖ m) + (1 - β) KL(q ‖ m)",
    "skew_kl": "KL(p ‖ β p + (1 - β) q)",
}


def recipe_script(report: Report, plan: Plan, request: CreateRecovery, patched: bool = False) -> str:
    """The script as Python source; the same recovery gives the same text.

    Args:
        report: of a recovery that trained.
        patched: training went on with an adapter that a repair left, and that lies in `start/`.
    """
    training = report.training
    assert training
    start: Start = "student" if training.started_from == "student" else "adapter" if patched else "repaired"
    phases = _phases(training)
    template = _environment().get_template("recipe.py.jinja")
    return template.render(
        about=_about(training, phases, start, _besides(plan, request, training)),
        facts=_facts(report, training),
        seed=report.provenance.seed,
        plan=plan,
        divergence=plan.divergence,
        formula=FORMULAS[plan.divergence.name],
        start=start,
        mode=training.mode,
        adapter=training.mode in {"lora", "dora"},
        ranks=ranks(plan.trainable.rank, report.damage.distance_by_layer),
        phases=phases,
        by_teacher=any(phase.data in {"teacher", "student", "demonstrated"} for phase in phases),
        averaged=plan.ema_rate is not None,
        shown=any(phase.data == "demonstrated" for phase in phases),
        fitted=training.fitted_answers,
        keep=training.keep_answers > 0,
        merges=plan.output == "merged" and not report.forms,
        **_rollouts(phases, request),
    )


@cache  # which keeps the template's compiled form
def _environment() -> Environment:
    environment = Environment(  # Python, not HTML: what comes from outside passes one of the filters
        loader=PackageLoader("recoup_ml", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(literal=json.dumps, comment=comment, lines=lines)
    return environment


def comment(text: str) -> str:
    """Text as comment lines that nothing in it can end."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return fill(line, COLUMNS, initial_indent="# ", subsequent_indent="#   ")


def lines(text: str) -> str:
    """Text as indented lines."""
    return fill(text, COLUMNS, initial_indent="    ", subsequent_indent="    ")


@dataclass(frozen=True)
class _Phase:
    """A phase as far as the checkpoint that was kept."""

    data: Data
    planned: int
    taken: int
    learning_rate: float


def _phases(training: TrainingReport) -> list[_Phase]:
    """All planned steps where no checkpoint was kept; none of the first phase's where it is the start."""
    kept = next((point.step for point in training.checkpoints if point.chosen), None)
    phases, before = [], 0
    for phase in training.phases:
        taken = phase.planned_steps if kept is None else min(phase.steps, kept - before)
        before += phase.steps
        if taken > 0 or not phases:
            phases.append(_Phase(phase.data, phase.planned_steps, taken, phase.learning_rate))
    return phases


def _about(training: TrainingReport, phases: Sequence[_Phase], start: Start, besides: Sequence[str]) -> str:
    kept = any(point.chosen for point in training.checkpoints)
    lessons = [LESSONS[phase.data] for phase in phases]
    return fill(" ".join([FILES, STARTS[start], *lessons, *besides, ENDS if kept else DIVERGED]), COLUMNS)


def _besides(plan: Plan, request: CreateRecovery, training: TrainingReport) -> list[str]:
    """What is not plain about the lessons."""
    averaged, pulled = plan.ema_rate is not None, regulariser.wanted(request.alignment)
    return (
        [WHOLE] * plan.prompts
        + [OTHERS] * (training.fitted_answers > 0)
        + [AVERAGED] * averaged
        + [KEEPS] * (training.keep_answers > 0)
        + [PULLED] * pulled
    )


def _facts(report: Report, training: TrainingReport) -> list[str]:
    made, versions = report.provenance, report.provenance.versions
    repair = [] if training.started_from == "student" else [f"Repaired before by {training.started_from}"]
    form = next((form.form for form in report.forms if form.handed_over and form.form != "adapter"), None)
    return [
        f"Recovery {report.recovery} of {day(report.created_at)}: {report.outcome}. {report.reason}",
        f"Student {made.student}, sha256 of its weights {made.student_sha256}",
        *repair,
        f"Teacher {made.teacher}, sha256 of its weights {made.teacher_sha256}",
        *([f"Handed over {form}; this script leaves the adapter that came before that"] if form else []),
        "With " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def _rollouts(phases: Sequence[_Phase], request: CreateRecovery) -> dict[str, Any]:
    """How the student answers while it trains, if it does."""
    if not any(phase.data in {"student", "demonstrated"} for phase in phases):
        return {"rollouts": None, "skip": 0}
    spec = request.method.rollouts
    limit = request.generation.max_new_tokens if spec.max_new_tokens == "auto" else spec.max_new_tokens
    return {"rollouts": spec, "max_new_tokens": limit, "skip": spec.skip_tokens}
