"""One runner process, watched: the lease is renewed here, not in the training loop.

A long CUDA step must not lose the lease, and a dead runner must not keep it. The runner
leads a process group of its own, which never outlives the claim: it is ended when the claim is
lost, when the job is to be cancelled or paused, at its deadline, when it has shown no sign of
life for too long, and when the worker shuts down. All but a lost claim and a stuck runner leave
it a grace in which to save what it has.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Literal

from recoup_jobs import tracing
from recoup_jobs.claims import Claim
from recoup_jobs.errors import StaleClaim
from recoup_jobs.failures import OUT_OF_MEMORY
from recoup_jobs.ledger import Ledger
from recoup_jobs.processes import kill_group
from recoup_jobs.settings import Settings
from recoup_worker import exits
from recoup_worker.gpus import visible
from recoup_worker.lease import Lease
from recoup_worker.memory import oom_kills
from recoup_worker.meter import Meter

POLL_SECONDS = 0.2
Ending = Literal["lost", "asked", "released", "deadline", "stalled", "exited"]
WITH_GRACE: frozenset[Ending] = frozenset({"asked", "released", "deadline"})
RUNNER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NOT_FOR_RUNNERS = frozenset({"RECOUP_API_KEY", "RECOUP_SECRETS_DIR"})

log = logging.getLogger(__name__)


def supervise(claim: Claim, ledger: Ledger, settings: Settings, stopping: threading.Event) -> None:
    """Runs the claimed job to its end, or to the end of this worker's right to it."""
    lease, kills = Lease(ledger, claim, settings.lease_seconds), oom_kills()
    meter = Meter(ledger, claim, settings.queue)
    with start_runner(claim, settings) as runner:
        try:
            ending = _watch(runner, lease, meter, claim, settings, stopping)
            if ending in WITH_GRACE:
                _stop(runner, lease, settings.grace_seconds)
        finally:
            kill_group(runner)
    log.info("%s: the runner of epoch %d is gone: %s", claim.job_id, claim.epoch, ending)
    memory_ran_out = runner.returncode == -signal.SIGKILL and oom_kills() > kills
    try:
        _conclude(ending, runner.returncode, memory_ran_out, claim, ledger, lease)
    except StaleClaim:
        log.info("%s: no longer held at epoch %d", claim.job_id, claim.epoch)
    meter.close()


def start_runner(claim: Claim, settings: Settings) -> subprocess.Popen[bytes]:
    folder = settings.jobs_dir / claim.job_id
    folder.mkdir(parents=True, exist_ok=True)
    inherited = os.environ | settings.environment() | RUNNER_ENVIRONMENT | visible(settings.gpus)
    inherited |= {tracing.TRACEPARENT: tracing.traceparent() or ""}
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
    lease: Lease,
    meter: Meter,
    claim: Claim,
    settings: Settings,
    stopping: threading.Event,
) -> Ending:
    """Renews the lease until the runner ends or is to be ended; answers which it was."""
    deadline = time.monotonic() + _seconds_left(claim)
    while runner.poll() is None:
        heard = lease.look()
        meter.look()
        if heard == "lost":
            return "lost"
        if heard != "held":
            return "asked"
        if stopping.is_set():
            return "released"
        if time.monotonic() >= deadline:
            return "deadline"
        if lease.quiet_seconds > settings.stall_seconds:
            return "stalled"
        stopping.wait(POLL_SECONDS)
    return "exited"


def _seconds_left(claim: Claim) -> float:
    limit = claim.request.limits.wall_seconds
    return math.inf if limit is None else limit - claim.spent_seconds


def _stop(runner: subprocess.Popen[bytes], lease: Lease, grace_seconds: float) -> None:
    """SIGTERM, and a grace in which the lease is still held, so that what is saved can be committed."""
    runner.terminate()
    until = time.monotonic() + grace_seconds
    while runner.poll() is None and time.monotonic() < until and lease.look() != "lost":
        time.sleep(POLL_SECONDS)


def _conclude(
    ending: Ending, code: int, memory_ran_out: bool, claim: Claim, ledger: Ledger, lease: Lease
) -> None:
    """What the ledger is told of a runner's end; it refuses if the runner has told it already."""
    if ending in {"asked", "released"}:
        ledger.release(claim)
    elif ending == "deadline":
        limit = claim.request.limits.wall_seconds
        ledger.fail(claim, "deadline_exceeded", f"limits.wall_seconds is {limit}; time is up.", retry=False)
    elif ending == "stalled":
        ledger.lose(claim, "runner_stalled")
    elif memory_ran_out:
        ledger.fail(claim, OUT_OF_MEMORY, "The kernel killed the runner: memory ran out.", retry=True)
    elif code < 0 or code == exits.STOPPED or lease.was_away:
        ledger.lose(claim)
    elif ending == "exited":
        message = f"The runner ended with code {code} before it could say why; its runner.log does."
        ledger.fail(claim, "runner_crashed", message, retry=True)
