"""A recovery from beginning to end: read this first.

Each stage is one call into one sibling file. It fills a folder, which the journal commits;
a stage that was committed is skipped when a job is taken up again after a crash, and one that
was not goes on from what it kept as `durable.UNFINISHED`. What one stage leaves, the next reads
from there. One model is in memory at a time.

    compose    the teacher writes the prompts, where none are given
    diagnose   what happened to the weights, how far the student is from its teacher
    generate   the teacher answers training and validation prompts
    distil     the student learns the teacher's distribution on those answers
    evaluate   the same measures again, alignment before and after, the verdict
    package    adapter or model, report, page, card

The stage before these, preflight, needs no torch and is the service's.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recoup.schemas import ComposedPrompts, Outcome, Stage
from recoup_ml import answers, compose, diagnose, distil, durable, evaluate, examination, package
from recoup_ml.run import Done, Journal, Run


def recover(run: Run, journal: Journal) -> Outcome:
    """Runs every stage that is not committed yet; returns what came of the recovery.

    Raises:
        RecoveryError: with the code that the failed job keeps.
        Interrupted: the journal asked to stop.
    """
    done: dict[Stage, Path] = {}
    run = _with_prompts(run, journal, done)

    def stage(name: Stage, work: Callable[[Run, Journal, Done, Path], None]) -> None:
        done[name] = journal.stage(name, lambda folder: work(run, journal, done, folder))
        durable.remove(done[name] / durable.UNFINISHED)

    stage("diagnose", diagnose.diagnose)
    if diagnose.read(done).needed:
        stage("generate", answers.generate)
        stage("distil", distil.distil)
    stage("evaluate", evaluate.evaluate)
    stage("package", package.package)
    return evaluate.read(done).outcome


def examine(run: Run, journal: Journal) -> None:
    """A diagnosis: the first stages of a recovery, and its report.

    Raises:
        RecoveryError: with the code that the failed job keeps.
    """
    done: dict[Stage, Path] = {}
    run = _with_prompts(run, journal, done)
    done["diagnose"] = journal.stage("diagnose", lambda folder: diagnose.diagnose(run, journal, done, folder))
    journal.stage("package", lambda folder: examination.package(run, journal, done, folder))


def _with_prompts(run: Run, journal: Journal, done: dict[Stage, Path]) -> Run:
    """The run with the prompts that the teacher wrote, if it was to."""
    if not isinstance(run.request.prompts, ComposedPrompts):
        return run
    done["compose"] = journal.stage("compose", lambda folder: compose.compose(run, journal, done, folder))
    durable.remove(done["compose"] / durable.UNFINISHED)
    return replace(run, prompts=compose.prompts(done))
