"""Hints: how a worker learns that there may be work. The message is never the truth, the row is.

A hint carries a job's id and nothing else. It is acknowledged before the work begins, may
come twice, late or never; the sweeper reads from the ledger which jobs nobody heard of and
publishes them again. The settings are those that lost, stuck or doubled no job in the
fault table of Celery 5.7 on Redis (late acks, result backends and prefetching all did).
"""

import logging
import threading
from collections.abc import Callable, Iterable

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings

RUN_JOB = "recoup.run_job"
"""The only task; its only argument is the job's id."""

QUEUES = ("gpu.cpu", "gpu.1x24g", "gpu.1x80g", "gpu.8x80g")
"""Classes of machine."""

Publish = Callable[[str, str], None]
"""`publish(job_id, queue)`."""

OUTAGES = (BrokerError, OperationalError, InterfaceError, PoolTimeout)

log = logging.getLogger(__name__)


def celery_app(broker_url: str, queues: Iterable[str] = QUEUES) -> Celery:
    app = Celery("recoup", broker=broker_url)
    app.conf.update(
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_queues=[_queue(name) for name in queues],
        task_create_missing_queues=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_hijack_root_logger=False,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "global_keyprefix": "recoup:",
        },
    )
    return app


def celery_publisher(app: Celery) -> Publish:
    """Publishes once and does not retry: the sweeper is the retry."""

    def publish(job_id: str, queue: str) -> None:
        app.send_task(RUN_JOB, args=[job_id], queue=_queue(queue), retry=False)

    return publish


def _queue(name: str) -> Queue:
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]


class Sweeper:
    """A thread that publishes what is due. Several may run; a hint too many is harmless."""

    def __init__(self, ledger: Ledger, publish: Publish, settings: Settings) -> None:
        self._ledger = ledger
        self._publish = publish
        self._settings = settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.sweep_seconds):
            try:
                self._sweep()
            except OUTAGES as outage:
                log.warning("no hint could be published, the next sweep tries again: %s", outage)

    def _sweep(self) -> None:
        for job_id, queue in self._ledger.due(self._settings.republish_seconds):
            self._publish(job_id, queue)
            self._ledger.mark_published(job_id)
