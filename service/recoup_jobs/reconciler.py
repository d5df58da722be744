"""The reconciler: makes the servers have what is wanted, and nothing that is not.

Each round looks at what every server lists, loads what is missing there (a server that was restarted has
nothing, one may have lost an adapter), proves what was loaded by the effect probe (`effect.py`), unloads
what ended, and writes down what it found. The probe is repeated now and then, because a server may lose an
adapter and still list it. A deployment becomes live once one server is proven and none refused; it fails at
the first refusal. Once live it stays wanted: a server that must not serve it is left out, and tried again.

Every API process has a reconciler; one of them leads, by a lease in the ledger, as with sweepers.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from recoup.schemas import Deployment, JobError
from recoup_jobs import publication
from recoup_jobs.database import AWAY
from recoup_jobs.deployments import Deployments, Placed
from recoup_jobs.effect import verdict
from recoup_jobs.errors import RecoupError
from recoup_jobs.ledger import Ledger
from recoup_jobs.replica import Away, Refused, Replica, Seen
from recoup_jobs.settings import Settings

ROLE = "reconciler"
LEAD_SECONDS = 60.0
"""A leader that vanished is missed for so long."""
DRAIN_SECONDS = 5.0
"""What ended is unloaded so much later: a gateway may have sent a request there a moment ago."""

log = logging.getLogger(__name__)


class Reconciler:
    """A thread that reconciles while it leads."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self._ledger, self._settings, self._clock = ledger, settings, clock
        self._drain_seconds = drain_seconds
        self._deployments = Deployments(ledger, settings.serve_urls)
        self._replicas = {url: Replica(url) for url in settings.serve_urls}
        self._known: dict[tuple[str, str], tuple[Placed, float]] = {}
        """By deployment and server: what was found, and when it was last proven."""
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._leading, self._ask_at = False, 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and lets another reconciler lead at once."""
        self._stopping.set()
        self._thread.join()
        for replica in self._replicas.values():
            replica.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def reconcile(self) -> None:
        """One round."""
        wanted = self._deployments.wanted()
        ended = self._deployments.ended(self._drain_seconds)
        self._clear_folders({deployment.id for deployment in wanted})
        if not wanted and not ended:
            return
        seen = {url: self._look(url) for url in self._replicas}
        for deployment in wanted:
            if self._stopping.is_set() or not self._leads():
                return
            hindrances = self._lay_out(deployment)
            found = [self._settle(deployment, url, seen[url]) for url in self._replicas]
            self._conclude(deployment, [placed for placed in found if placed], hindrances)
        for id, url in ended:
            self._clear(id, url, seen.get(url))

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.reconcile_seconds):
            try:
                if self._leads():
                    self.reconcile()
            except AWAY as outage:
                log.warning("deployments could not be compared, the next round tries again: %s", outage)
            except OSError as error:
                log.warning("a deployment's folder could not be changed: %s", error)
        with contextlib.suppress(*AWAY):
            self._ledger.resign(ROLE, self._name)

    def _leads(self) -> bool:
        """Asked for again long before it runs out."""
        if time.monotonic() >= self._ask_at:
            self._leading = self._ledger.lead(ROLE, self._name, LEAD_SECONDS)
            self._ask_at = time.monotonic() + LEAD_SECONDS / 20
        return self._leading

    def _look(self, url: str) -> Seen | None:
        try:
            return self._replicas[url].look()
        except (Away, Refused):
            return None

    def _lay_out(self, deployment: Deployment) -> list[JobError]:
        """Has a whole model lie there before any server has it, for vLLM is started on it; why it cannot."""
        if deployment.kind == "adapter":
            return []
        try:
            publication.place(deployment, deployment.id, self._ledger, self._settings)
        except RecoupError as error:
            return [_reason(error.code, error.message)]
        return []

    def _settle(self, deployment: Deployment, url: str, seen: Seen | None) -> Placed | None:
        """What is to be noted of this server; None where it has nothing to do with the deployment."""
        base = seen and _base_of(deployment, seen)
        before, _ = self._known.get((deployment.id, url), (None, 0.0))
        if seen is not None and base is None:
            if before or deployment.replicas:
                self._forget(deployment.id, url)
            return None
        placed = self._proven(deployment, url, seen, base) if seen and base else Placed(url, "away")
        if placed is before or (placed == before and placed.state == "away"):
            return before
        self._known[deployment.id, url] = placed, self._clock()
        self._deployments.place(deployment.id, placed)
        return placed

    def _proven(self, deployment: Deployment, url: str, seen: Seen, base: tuple[str, str]) -> Placed:
        known, at = self._known.get((deployment.id, url), (Placed(url, "away"), 0.0))
        is_there = deployment.id in seen.adapters or deployment.id in seen.bases
        recent = self._clock() - at < self._settings.probe_seconds
        if recent and (known.state == "refused" or (known.state == "ready" and is_there)):
            return known
        if deployment.state == "pending":
            self._deployments.move(deployment.id, "probing")
        try:
            return self._place(deployment, url, base, is_there)
        except Away:
            return Placed(url, "away")

    def _place(self, deployment: Deployment, url: str, base: tuple[str, str], is_there: bool) -> Placed:
        """Loads it unless it is there, and proves it; what is not proven is unloaded."""
        replica = self._replicas[url]
        try:
            probe = publication.read_probe(self._ledger, self._settings, deployment.lineage.recovery)
            is_adapter = deployment.kind == "adapter"
            if not is_there:
                if is_adapter and publication.base_changed(deployment, probe, self._settings):
                    raise Refused(
                        _reason("base_changed", "The student is no longer the one that was trained.")
                    )
                replica.load(
                    deployment.id, publication.place(deployment, base[1], self._ledger, self._settings)
                )
            served = replica.log_probabilities(deployment.id, probe.rows)
            student = replica.log_probabilities(base[0], probe.rows) if is_adapter else None
            why = verdict(probe, served, student)
        except Refused as refused:
            why = refused.reason
        except RecoupError as error:
            why = _reason(error.code, error.message)
        if why is None:
            return Placed(url, "ready")
        log.warning("deployment %s is not served by %s: %s", deployment.id, url, why.message)
        with contextlib.suppress(Refused):
            replica.unload(deployment.id)
        return Placed(url, "refused", why)

    def _conclude(
        self, deployment: Deployment, found: Sequence[Placed], hindrances: Sequence[JobError]
    ) -> None:
        refusals = [*hindrances, *(placed.reason for placed in found if placed.state == "refused")]
        ready = any(placed.state == "ready" for placed in found)
        if deployment.state != "live" and refusals:
            self._deployments.move(deployment.id, "failed", refusals[0])
        elif ready:
            if deployment.state == "pending":
                self._deployments.move(deployment.id, "probing")
            self._deployments.move(deployment.id, "live")
        else:
            reason = refusals[0] if refusals else _missing(deployment, found)
            self._deployments.move(deployment.id, "live" if deployment.state == "live" else "pending", reason)

    def _clear(self, id: str, url: str, seen: Seen | None) -> None:
        """Unloads what ended; where the server is away that waits, where it is no longer ours it is over."""
        if url in self._replicas:
            if seen is None:
                return
            try:
                self._replicas[url].unload(id)
            except (Away, Refused) as error:
                log.warning("deployment %s could not be unloaded from %s: %s", id, url, error)
                return
        self._forget(id, url)
        if not self._deployments.placed(id):
            publication.clear(id, self._settings)

    def _clear_folders(self, wanted: AbstractSet[str]) -> None:
        """Of what ended before any server had it."""
        for id in self._deployments.over(publication.placed(self._settings) - wanted, self._drain_seconds):
            publication.clear(id, self._settings)

    def _forget(self, id: str, url: str) -> None:
        self._known.pop((id, url), None)
        self._deployments.remove(id, url)


def _base_of(deployment: Deployment, seen: Seen) -> tuple[str, str] | None:
    """(name, folder) of the model on this server beside which, or as which, the deployment is served."""
    if deployment.kind == "model":
        own = seen.bases.get(deployment.id)
        return (deployment.id, own or deployment.id) if own or seen.takes_models else None
    student = deployment.lineage.student
    for name, folder in seen.bases.items():
        by_place = name == student.rpartition("/")[2] or folder.endswith(f"/{student}")
        if student in {name, folder} or (by_place and not seen.takes_models):
            return name, folder
    return None


def _missing(deployment: Deployment, found: Sequence[Placed]) -> JobError:
    if found:
        start = "; start a vLLM as `launch` says" if deployment.kind == "model" else ""
        return _reason("replicas_away", f"No server that could serve this answers{start}.")
    what = "an engine or a vLLM started as `launch` says"
    if deployment.kind == "adapter":
        what = f"a server of {deployment.lineage.student}"
    return _reason("no_replica", f"None of the servers can serve this; it waits for {what}.")


def _reason(code: str, message: str) -> JobError:
    return JobError(code=code, message=message)
