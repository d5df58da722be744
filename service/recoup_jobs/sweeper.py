"""The sweeper: reads from the ledger what nobody else will see to, and sees to it.

Jobs that no worker heard of are published, again and again until one is claimed: the outbox is
a column of the row, so what was accepted while the broker was away runs once it is back. Jobs
whose worker vanished are given back. Garbage is collected. Every API process has a sweeper; one
of them leads, by a lease in the ledger, and another takes over when that runs out.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time

from kombu.exceptions import OperationalError as BrokerError

from recoup_jobs import tracing
from recoup_jobs.database import AWAY
from recoup_jobs.deliveries import deliver
from recoup_jobs.dispatch import Publish
from recoup_jobs.errors import Unavailable
from recoup_jobs.garbage import collect
from recoup_jobs.ledger import Ledger
from recoup_jobs.metrics import HINTS
from recoup_jobs.settings import Settings
from recoup_jobs.signing import installation_secret

ROLE = "sweeper"
LEAD_SECONDS, GARBAGE_SECONDS, DELIVER_SECONDS = 10.0, 60.0, 1.0

log = logging.getLogger(__name__)


class Sweeper:
    """A thread that sweeps while it leads."""

    def __init__(self, ledger: Ledger, publish: Publish, settings: Settings) -> None:
        self._ledger = ledger
        self._publish = publish
        self._settings = settings
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._leading, self._ask_at = False, 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._postman = threading.Thread(target=self._deliver, name="webhooks", daemon=True)
        self._collector = threading.Thread(target=self._collect, name="garbage", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._postman.start()
        self._collector.start()

    def stop(self) -> None:
        """Ends the thread and lets another sweeper lead at once."""
        self._stopping.set()
        self._thread.join()
        self._postman.join()
        self._collector.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.sweep_seconds):
            try:
                if self._leads(time.monotonic()):
                    self._sweep()
            except (BrokerError, OSError, *AWAY) as outage:
                log.warning("no hint could be published, the next sweep tries again: %s", outage)
        with contextlib.suppress(*AWAY):
            self._ledger.resign(ROLE, self._name)

    def _deliver(self) -> None:
        """Webhooks in a thread of their own, since a host may take its time; any process may deliver."""
        secret = installation_secret(self._settings)
        while not self._stopping.wait(DELIVER_SECONDS):
            try:
                deliver(self._ledger, secret)
            except AWAY as outage:
                log.warning("no webhook could be delivered, the next look tries again: %s", outage)

    def _collect(self) -> None:
        """Garbage in a thread of its own, since a store may take its time."""
        while not self._stopping.wait(GARBAGE_SECONDS):
            try:
                if self._leading:
                    collect(self._ledger, self._settings)
            except (OSError, Unavailable, *AWAY) as error:
                log.warning("what is no longer needed could not be removed: %s", error)

    def _leads(self, moment: float) -> bool:
        if moment >= self._ask_at:
            self._leading = self._ledger.lead(ROLE, self._name, LEAD_SECONDS)
            self._ask_at = moment + LEAD_SECONDS / 3
        return self._leading

    def _sweep(self) -> None:
        self._ledger.take_back()
        for job_id, queue in self._ledger.due(self._settings.republish_seconds):
            with tracing.span("publish", self._ledger.traceparent(job_id), job_id=job_id):
                self._publish(job_id, queue)
            self._ledger.mark_published(job_id)
            HINTS.inc()
