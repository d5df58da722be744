"""Hints: how a worker learns that there may be work. The message is never the truth, the row is.

A hint carries a job's id and nothing else. It is acknowledged before the work begins, may
come twice, late or never; the sweeper (`sweeper.py`) reads from the ledger which jobs nobody heard of and
publishes them again. The settings are those that lost, stuck or doubled no job in the
fault table of Celery 5.7 on Redis (late acks, result backends and prefetching all did).
"""

from collections.abc import Callable, Iterable

from celery import Celery
from kombu.entity import Queue

RUN_JOB = "recoup.run_job"
"""The only task; its only argument is the job's id."""

QUEUES = ("gpu.cpu", "gpu.1x24g", "gpu.1x80g", "gpu.8x80g")
"""Classes of machine."""

Publish = Callable[[str, str], None]
"""`publish(job_id, queue)`."""


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
