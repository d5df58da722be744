"""What an installation looks like now, read from the ledger for whoever scrapes it.

Jobs that have not ended are found by an index on the state, those that ended by one on the time: a look
costs as much as there is to do, not as much as there ever was.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Select, and_, func, select

from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.claims import abandoned
from recoup_jobs.dispatch import QUEUES
from recoup_jobs.kinds import PREFIXES, JobKind
from recoup_jobs.ledger import Ledger
from recoup_jobs.metrics import REGISTRY, Gauges
from recoup_jobs.tables import events, jobs, now

DAY_SECONDS = 86_400.0


def exposition(ledger: Ledger) -> bytes:
    """Prometheus' text format: what this process counts, and what the ledger knows."""
    asked = CollectorRegistry(auto_describe=False)
    asked.register(LedgerCollector(ledger))
    return generate_latest(REGISTRY) + generate_latest(asked)


class LedgerCollector(Collector):
    """Asks the ledger anew at each scrape."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        found = Gauges()
        with self._ledger.reading() as conn:
            for kind, prefix in PREFIXES.items():
                _jobs(conn, kind, prefix, found)
            _waiting(conn, found)
            found.outbox_lag.add_metric([], conn.execute(_unpublished()).scalar_one() or 0.0)
            found.abandoned.add_metric([], conn.execute(_count().where(abandoned())).scalar_one())
        yield from vars(found).values()


def _jobs(conn: Connection, kind: JobKind, prefix: str, found: Gauges) -> None:
    ours = jobs.c.id.startswith(prefix, autoescape=True)
    live = select(jobs.c.state, func.count()).where(ours, jobs.c.state.not_in(TERMINAL_STATES))
    for state, count in conn.execute(live.group_by(jobs.c.state)):
        found.live.add_metric([kind, state], count)
    end = jobs.c.state, func.coalesce(jobs.c.outcome, "none")
    ended = select(*end, func.count()).where(ours, jobs.c.finished_at > now() - DAY_SECONDS)
    for state, outcome, count in conn.execute(ended.group_by(*end)):
        found.ended.add_metric([kind, state, outcome], count)


def _waiting(conn: Connection, found: Gauges) -> None:
    """Every known class of machine has a value: an alert on silence needs a zero to compare with."""
    waiting = dict.fromkeys(QUEUES, (0, 0.0))
    query = _queued(jobs.c.queue, func.count(), func.max(now() - events.c.at)).group_by(jobs.c.queue)
    waiting |= {queue: (count, seconds) for queue, count, seconds in conn.execute(query)}
    for queue, (count, seconds) in waiting.items():
        found.depth.add_metric([queue], count)
        found.oldest.add_metric([queue], max(0.0, seconds))


def _queued(*columns: Any) -> Select[Any]:
    """Of the jobs that wait; `events.at` is when each began to: nothing is written of a job that waits."""
    last = and_(events.c.job_id == jobs.c.id, events.c.seq == jobs.c.last_seq)
    return select(*columns).select_from(jobs.join(events, last)).where(jobs.c.state == "queued")


def _unpublished() -> Select[Any]:
    return _queued(func.max(now() - events.c.at)).where(jobs.c.published_at.is_(None))


def _count() -> Select[Any]:
    return select(func.count()).select_from(jobs)
