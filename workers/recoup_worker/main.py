"""All wiring of the worker, in one place.

Celery runs one task at a time in a thread (pool `threads`, concurrency 1): the task only
supervises a process of its own, so neither a crash nor CUDA touches the worker.
"""

import os
import signal
import socket
import threading

from celery import Celery
from celery.signals import setup_logging, worker_shutting_down

from recoup_jobs import logs
from recoup_jobs.dispatch import QUEUES, RUN_JOB, celery_app
from recoup_jobs.ledger import open_ledger
from recoup_jobs.machines import announce
from recoup_jobs.scrubber import scrub_logs
from recoup_jobs.settings import Settings
from recoup_worker.gpus import owned
from recoup_worker.memory import device_memory_bytes
from recoup_worker.scrapes import showing_metrics
from recoup_worker.tasks import follow_hint, take_one
from recoup_worker.turns import require_an_environment


def serve(settings: Settings) -> None:
    """Works until SIGTERM or SIGINT; a job that runs then is given back to the queue."""
    scrub_logs()
    if settings.broker_url is None:
        raise SystemExit("RECOUP_BROKER_URL is not set: a worker needs a Redis or Valkey to hear of jobs.")
    require_an_environment(settings)
    options = [
        "--pool=threads",
        "--concurrency=1",
        f"--queues={settings.queue}",
        f"--hostname=recoup-{os.getpid()}@%h",
        "--loglevel=INFO",
        "--without-gossip",
        "--without-mingle",
    ]
    setup_logging.connect(lambda **_: logs.configure(settings.log_format), weak=False)
    with owned(settings.gpus, settings.home), showing_metrics(settings.metrics_listen):
        worker_app(settings, settings.broker_url).worker_main(["worker", *options])


def serve_once(settings: Settings) -> None:
    """Works on one job, if one waits, and ends: what a scheduler starts for each job (Kubernetes, Slurm).

    It asks the ledger alone; nobody has to send it a hint, so it needs no broker.
    """
    require_an_environment(settings)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    ledger = open_ledger(settings)
    with owned(settings.gpus, settings.home), showing_metrics(settings.metrics_listen) as scrapes:
        if take_one(ledger, settings, owner_name(), stopping):
            scrapes.wait_for_next(stopping)
    ledger.close()


def worker_app(settings: Settings, broker_url: str) -> Celery:
    """The Celery application with its one task."""
    app = celery_app(broker_url, {*QUEUES, settings.queue})
    ledger = open_ledger(settings)
    stopping = threading.Event()
    announce(ledger, owner_name(), settings.queue, device_memory_bytes())
    worker_shutting_down.connect(lambda **_: stopping.set(), weak=False)

    def run_job(job_id: str) -> None:
        follow_hint(job_id, ledger, settings, owner_name(), stopping)

    app.task(name=RUN_JOB)(run_job)
    return app


def owner_name() -> str:
    """Who holds a claim: host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"
