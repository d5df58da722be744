"""How long a class of machine takes for so much work, from the jobs that it has finished.

A worker writes one row a stage of a finished recovery: the mode of training, the student's parameters, the
work as it had been estimated (passes of a token through a model, times parameters) and the seconds it took.
Since the seconds stand beside the *estimated* work, whatever the estimate counts wrongly is in the rate too.

    seconds = start + rate x work

is fitted to the rows of a stage, each weighted by how like the asked job it is. Errors are relative, so that
one job that took far too long weighs little. Where the rows leave both open, half of the time is taken for
the start (loading, compiling), which the first row alone cannot tell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import delete, func, insert, select

from recoup.schemas import Stage
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import calibrations, now

OTHER_MODE = 4.0
"""A row of another mode of training weighs by e to the minus this."""
ALIKE = 0.5
"""Weights above this, of the greatest, tell what is usual."""
FEW = 0.5
PULL = 0.02
"""Towards the half, in rows."""
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
    def weight(one: Measured) -> float:
        apart = abs(math.log(one.parameters / max(1, parameters)))
        return math.exp(-apart - (OTHER_MODE if one.mode != mode else 0.0))

    rows = [one for one in known if one.stage == stage and one.work > 0 and one.seconds > 0]
    if not rows:
        return None
    weights = [weight(one) for one in rows]
    start, rate = _fitted(rows, [one / max(weights) for one in weights])
    return start + rate * work


def _fitted(rows: Sequence[Measured], weights: Sequence[float]) -> tuple[float, float]:
    """(start, rate): least squares of relative errors, neither below 0, drawn a little towards the half.

    In units of the usual, (u, v) = (start / usual start, rate / usual rate), so that (1, 1) is the half. A
    row counts by its error relative to its own seconds or, if these are few, to `FEW` of what is usual.
    """
    alike = [one for one, weight in zip(rows, weights, strict=True) if weight > ALIKE]
    seconds, rate = (median(one.seconds for one in alike), median(one.seconds / one.work for one in alike))
    pp, pq, qq, p, q = PULL, 0.0, PULL, PULL, PULL
    for one, weight in zip(rows, weights, strict=True):
        scale = max(one.seconds, FEW * seconds)
        at_start, by_rate, told = seconds / 2 / scale, rate / 2 * one.work / scale, one.seconds / scale
        pp += weight * at_start * at_start
        pq += weight * at_start * by_rate
        qq += weight * by_rate * by_rate
        p += weight * at_start * told
        q += weight * by_rate * told
    determinant = pp * qq - pq * pq
    u, v = (p * qq - q * pq) / determinant, (q * pp - p * pq) / determinant
    if u < 0:
        u, v = 0.0, q / qq
    if v < 0:
        u, v = p / pp, 0.0
    return u * seconds / 2, v * rate / 2
