"""The job's own process: `python -m recoup_worker.runner <job> <epoch>`, started by the supervisor.

It runs one claimed recovery, or a diagnosis, and writes the end of it into the ledger. An error that the
recovery can explain fails the job at once; anything else is a bug or a broken machine, and
the job is tried again a few times. Killed, it leaves its committed stages behind, and of the
unfinished one what its successor goes on from. SIGTERM asks it to stop: it makes safe what it has,
publishes the best checkpoint if the job is being cancelled, and exits with a code of its own (`exits.py`).
"""

import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from recoup.schemas import FilePrompts
from recoup_jobs import logs, tracing
from recoup_jobs.claims import Claim
from recoup_jobs.datasets import load_prompts, load_text
from recoup_jobs.errors import RecoupError, StaleClaim, Unavailable
from recoup_jobs.harness import task_file
from recoup_jobs.kinds import kind_of
from recoup_jobs.ledger import Ledger, open_ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.processes import die_with_parent, die_with_stdin
from recoup_jobs.scrubber import scrub_logs, scrub_prints
from recoup_jobs.settings import Settings
from recoup_jobs.sources import locate
from recoup_ml.durable import UNFINISHED
from recoup_ml.run import Interrupted
from recoup_worker import exits
from recoup_worker.expectation import expect, expected, learn
from recoup_worker.journal import LedgerJournal
from recoup_worker.loading import loading
from recoup_worker.turns import served_by

ANSWERS = "answers"
"""The folder, below home, of servers' answers that recoveries share."""

if TYPE_CHECKING:
    from recoup_ml.run import Run


def main() -> int:
    gc.freeze()  # at the process's end the collector would look through all that was imported
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopping.set())
    die_with_parent()
    die_with_stdin()
    scrub_logs()
    scrub_prints()
    settings = Settings()
    job_id, epoch = sys.argv[1], int(sys.argv[2])
    logs.configure(settings.log_format)
    sent = tracing.start("recoup-runner")
    ids = {"job_id": job_id, "epoch": epoch}
    parent = os.environ.get(tracing.TRACEPARENT)
    try:
        with structlog.contextvars.bound_contextvars(**ids), tracing.span("run", parent, **ids):
            ledger = open_ledger(settings)
            return run_claimed(ledger.claimed(job_id, epoch), ledger, settings, stopping)
    finally:
        sent()


def run_claimed(claim: Claim, ledger: Ledger, settings: Settings, stopping: threading.Event) -> int:
    """Runs the recovery and ends the job: succeeded with an outcome, or failed with a code.

    Answers the exit code; where it was stopped, the job is not ended.
    """
    from recoup_ml.errors import RecoveryError

    try:
        _recover(claim, ledger, settings, stopping)
    except Interrupted:
        if ledger.get(claim.job_id).state == "cancelling":
            _publish_best(claim, ledger, settings)
        return exits.STOPPED
    except StaleClaim:
        raise
    except RecoveryError as error:
        ledger.fail(claim, error.code, str(error), retry=error.may_pass)
    except RecoupError as error:
        ledger.fail(claim, error.code, str(error), retry=isinstance(error, Unavailable))
    except Exception as error:
        traceback.print_exc()
        ledger.fail(claim, "internal_error", f"{type(error).__name__}: {error}", retry=True)
    return exits.ENDED


def _recover(claim: Claim, ledger: Ledger, settings: Settings, stopping: threading.Event) -> None:
    journal = LedgerJournal(ledger, claim, settings, stopping)

    is_recovery = kind_of(claim.job_id) == "recovery"

    def check(folder: Path) -> None:
        seen = preflight(claim.request, ledger, settings)
        if is_recovery:
            expect(claim, seen, ledger, settings, folder)

    checked = journal.stage("preflight", check)
    run = replace(_run(claim, ledger, settings), estimate=expected(checked))
    if not is_recovery:
        with loading():
            from recoup_ml.recipe import examine

        examine(run, journal)
        ledger.succeed(claim, None)
    else:
        with loading():
            from recoup_ml.recipe import recover

        outcome = recover(run, journal)
        learn(claim, ledger, settings, journal)
        ledger.succeed(claim, outcome)
    _clear_work(settings, claim)


def _publish_best(claim: Claim, ledger: Ledger, settings: Settings) -> None:
    """Makes the best checkpoint so far, if there is one, what the job hands over."""
    from recoup_ml import distil, package

    committed = ledger.committed(claim.job_id).get("distil")
    unfinished = f"{claim.job_id}/e{claim.epoch}/distil/{UNFINISHED}"
    best = settings.stage_folder(committed or unfinished) / distil.BEST
    if best.exists():
        run = _run(claim, ledger, settings)
        journal = LedgerJournal(ledger, claim, settings, threading.Event())
        journal.stage("package", lambda folder: package.checkpoint(run, journal, best, folder))


def _run(claim: Claim, ledger: Ledger, settings: Settings) -> "Run":
    from recoup_ml.run import HarnessTask, Run, Task

    request = claim.request
    text = request.evaluation.natural_text
    teacher = locate(request.teacher.source, settings.model_roots)
    urls, command = served_by(teacher, request, settings, settings.jobs_dir / claim.job_id)
    teach = request.teach
    return Run(
        job_id=claim.job_id,
        student=locate(request.student.source, settings.model_roots).path,
        teacher=teacher.path,
        request=request,
        prompts=load_prompts(ledger, settings, request.prompts),
        keep=load_prompts(ledger, settings, request.keep) if request.keep else [],
        teach=load_prompts(ledger, settings, FilePrompts(file=teach.file)) if teach else [],
        held_out=load_prompts(ledger, settings, FilePrompts(file=teach.held_out))
        if teach and teach.held_out
        else [],
        tasks=[
            Task(spec, load_prompts(ledger, settings, FilePrompts(file=spec.file)))
            for spec in request.evaluation.tasks
        ],
        harness=[
            HarnessTask(spec, task_file(settings.harness_tasks, spec.name))
            for spec in request.evaluation.harness
        ],
        natural_text=load_text(ledger, settings, text) if text else [],
        vllm_urls=urls,
        vllm_command=command,
        rollout_urls=tuple(settings.rollout_urls),
        answers=settings.home / ANSWERS,
        halvings=claim.memory_failures,
        processes=max(1, len(settings.gpus)),
    )


def _clear_work(settings: Settings, claim: Claim) -> None:
    """Removes what the stages left for one another; what was published and the log stay."""
    for epoch in (settings.jobs_dir / claim.job_id).glob("e*"):
        shutil.rmtree(epoch)


if __name__ == "__main__":
    sys.exit(main())
