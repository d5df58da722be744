"""One runner process, watched: the lease is renewed here, not in the training loop.

A long CUDA step must not lose the lease, and a dead runner must not keep it. The runner
leads a process group of its own, which never outlives the claim: it is killed when the
claim is lost, when the job is cancelled, at its deadline, and when the worker shuts down.
"""

import logging
import math
import os
import subprocess
import sys
import threading
import time
from typing import Literal

from recoup_jobs.claims import Claim
from recoup_jobs.ledger import Ledger
from recoup_jobs.processes import kill_group, stop_group
from recoup_jobs.settings import Settings

POLL_SECONDS, MOST_RENEW_SECONDS = 0.2, 2.0
Ending = Literal["lost", "cancel", "released", "deadline", "exited"]
RUNNER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NOT_FOR_RUNNERS = frozenset({"RECOUP_API_KEY"})

log = logging.getLogger(__name__)


def supervise(claim: Claim, ledger: Ledger, settings: Settings, stopping: threading.Event) -> None:
    """Runs the claimed job to its end, or to the end of this worker's right to it."""
    runner = start_runner(claim, settings)
    try:
        _watch(runner, claim, ledger, settings, stopping)
    finally:
        kill_group(runner)


def start_runner(claim: Claim, settings: Settings) -> subprocess.Popen[bytes]:
    folder = settings.jobs_dir / claim.job_id
    folder.mkdir(parents=True, exist_ok=True)
    inherited = os.environ | settings.environment() | RUNNER_ENVIRONMENT
    with (folder / "runner.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "recoup_worker.runner", claim.job_id, str(claim.epoch)],
            env={name: value for name, value in inherited.items() if name not in NOT_FOR_RUNNERS},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _watch(
    runner: subprocess.Popen[bytes],
    claim: Claim,
    ledger: Ledger,
    settings: Settings,
    stopping: threading.Event,
) -> None:
    """Renews the lease until the runner ends or is to be ended; then tells the ledger which it was."""
    renew_at, deadline = 0.0, _deadline(claim)
    ending: Ending | None = None
    while runner.poll() is None and ending is None:
        now = time.monotonic()
        if now >= renew_at:
            held = ledger.renew(claim, settings.lease_seconds)
            ending = None if held == "held" else held
            renew_at = now + min(settings.lease_seconds / 3, MOST_RENEW_SECONDS)
        if stopping.is_set():
            ending = "released"
        if now >= deadline:
            ending = "deadline"
        stopping.wait(POLL_SECONDS)
    if ending == "lost":
        log.warning("%s: the claim of epoch %d is lost", claim.job_id, claim.epoch)
        return
    if ending:
        stop_group(runner, settings.grace_seconds)
    if runner.returncode != 0:
        _conclude(ending or "exited", runner.returncode, claim, ledger)


def _conclude(ending: Ending, code: int, claim: Claim, ledger: Ledger) -> None:
    """What the ledger is told when a runner did not end by itself and well."""
    if ending == "cancel":
        ledger.cancelled(claim)
    elif ending == "released":
        ledger.release(claim)
    elif ending == "deadline":
        limit = claim.request.limits.wall_seconds
        ledger.fail(claim, "deadline_exceeded", f"limits.wall_seconds is {limit}; time is up.", retry=False)
    elif code < 0:
        ledger.lose(claim)
    else:
        message = f"The runner ended with code {code} before it could say why; its runner.log does."
        ledger.fail(claim, "runner_crashed", message, retry=True)


def _deadline(claim: Claim) -> float:
    limit = claim.request.limits.wall_seconds
    return math.inf if limit is None else time.monotonic() + limit
