"""What a job's events say, counted: the runner writes them, its supervisor reads them.

Every event of this claim is counted once, by whoever holds the claim. What an earlier holder's runner wrote
was that holder's to count. Nothing here may harm the job: while the database is away nothing is counted,
and it is made up for later.
"""

import logging
import re
import time
from typing import Any

from recoup_jobs import metrics
from recoup_jobs.claims import Claim
from recoup_jobs.database import AWAY
from recoup_jobs.kinds import kind_of
from recoup_jobs.ledger import Ledger

LOOK_SECONDS, PAGE = 10.0, 1000
GPUS = re.compile(r"gpu\.(\d+)x")
"""Classes of machine name their GPUs: `gpu.8x80g` has eight, `gpu.cpu` none."""

log = logging.getLogger(__name__)


def gpus(queue: str) -> int:
    found = GPUS.match(queue)
    return int(found[1]) if found else 0


class Meter:
    """Counts one claim: call `look` as often as you like, and `close` when the claim is over."""

    def __init__(self, ledger: Ledger, claim: Claim, queue: str) -> None:
        self._ledger, self._claim, self._queue = ledger, claim, queue
        self._counted_to = time.monotonic()
        self._look_at = self._counted_to + LOOK_SECONDS
        self._seen = 0
        self._started: dict[str, float] = {}

    def look(self) -> None:
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self.close()

    def close(self) -> None:
        """Counts what was not counted yet."""
        until = time.monotonic()
        metrics.GPU_SECONDS.labels(self._queue).inc(gpus(self._queue) * (until - self._counted_to))
        self._counted_to = until
        try:
            self._read()
        except AWAY as outage:
            log.warning("what the runner did could not be counted yet: %s", outage)

    def _read(self) -> None:
        more = True
        while more:
            page = self._ledger.events(self._claim.job_id, self._seen, PAGE)
            for event in page.data:
                self._seen = event.seq
                if event.epoch == self._claim.epoch:
                    self._count(event.type, event.data, event.at)
            more = page.has_more

    def _count(self, type: str, data: dict[str, Any], at: float) -> None:
        match type, data:
            case "state", {"state": "running"} if self._claim.epoch == 1:
                created_at = self._ledger.get(self._claim.job_id).created_at
                metrics.CLAIM_SECONDS.observe(max(0.0, at - created_at))
            case "stage", {"stage": str(stage), "status": "started"}:
                self._started[stage] = at
            case "stage", {"stage": str(stage), "status": "committed"} if stage in self._started:
                metrics.STAGE_SECONDS.labels(stage).observe(at - self._started[stage])
            case "metric", {"name": "tokens", "generated": int(count)}:
                metrics.TOKENS_GENERATED.inc(count)
            case "metric", {"name": "tokens", "trained": int(count)}:
                metrics.TOKENS_TRAINED.inc(count)
            case "metric", {"name": "verdict", "recovered": float(fraction)}:
                metrics.RECOVERED_FRACTION.observe(fraction)
            case "state", {"state": "succeeded" | "failed" | "cancelled" as state}:
                kind = kind_of(self._claim.job_id)
                metrics.JOBS_ENDED.labels(kind, state, data.get("outcome") or "none").inc()
