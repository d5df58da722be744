"""How long a class of machine takes for so much work, from the jobs that it has finished.

A worker writes one row a stage of a finished recovery: the mode of training, the student's parameters, the
work as it had been estimated (passes of a token through a model, times parameters) and the seconds it took.
Since the seconds stand beside the *estimated* work, whatever the estimate counts wrongly is in the rate
too. The time of another job is read off the rows that are most like it: the median of the nearest five.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import delete, func, insert, select

from recoup.schemas import Stage
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import calibrations, now

NEAREST = 5
MOST_ROWS = 2000
"""Kept for one class of machine."""


@dataclass(frozen=True)
class Measured:
    """One stage of a finished job."""

    stage: str
    mode: str
    """Of training: `lora`, `full`, …"""
    parameters: int
    work: float
    seconds: float


def record(ledger: Ledger, queue: str, job_id: str, measured: Sequence[Measured]) -> None:
    """Of a job that its machine has finished; what is too old to count is dropped."""
    rows = [vars(one) | {"queue": queue, "job_id": job_id} for one in measured]
    if not rows:
        return
    mine = calibrations.c.queue == queue
    newest = select(func.max(calibrations.c.number)).where(mine).scalar_subquery()
    with ledger.engine.begin() as conn:
        conn.execute(insert(calibrations).values([row | {"at": now()} for row in rows]))
        conn.execute(delete(calibrations).where(mine, calibrations.c.number <= newest - MOST_ROWS))


def read(ledger: Ledger, queue: str) -> list[Measured]:
    table = calibrations
    columns = (table.c.stage, table.c.mode, table.c.parameters, table.c.work, table.c.seconds)
    query = select(*columns).where(table.c.queue == queue).order_by(table.c.number.desc()).limit(MOST_ROWS)
    with ledger.reading() as conn:
        return [Measured(*row) for row in conn.execute(query)]


def jobs_measured(ledger: Ledger, queue: str) -> int:
    query = select(func.count(calibrations.c.job_id.distinct())).where(calibrations.c.queue == queue)
    with ledger.reading() as conn:
        return int(conn.execute(query).scalar_one())


def seconds_for(
    work: Mapping[Stage, float], mode: str, parameters: int, known: Sequence[Measured]
) -> float | None:
    """Of all these stages together; None where one of them was never measured."""
    stages = [_seconds(stage, amount, mode, parameters, known) for stage, amount in work.items()]
    return None if None in stages else math.fsum(filter(None, stages))


def _seconds(stage: str, work: float, mode: str, parameters: int, known: Sequence[Measured]) -> float | None:
    """Work of nearly the same amount, on nearly as many parameters, in the same mode."""

    def distance(one: Measured) -> float:
        apart = abs(math.log(one.work / work)) + abs(math.log(one.parameters / max(1, parameters)))
        return apart + (one.mode != mode)

    alike = sorted((one for one in known if one.stage == stage and one.work > 0), key=distance)
    rates = [one.seconds / one.work for one in alike[:NEAREST]]
    return work * median(rates) if rates else None
