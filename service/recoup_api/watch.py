"""Long poll: an answer waits until there is something new, and holds no thread while it waits."""

import asyncio
import re
import time

from fastapi.concurrency import run_in_threadpool

from recoup.schemas import Recovery
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.ledger import Ledger

LOOK_EVERY_SECONDS = 0.25


async def newer(ledger: Ledger, id: str, known: set[str], wait_seconds: float) -> Recovery:
    """The recovery once its ETag is not `known`, or it has ended, or the wait is over.

    With nothing known, what is new counts from the first look.
    """
    deadline = time.monotonic() + wait_seconds
    recovery = await run_in_threadpool(ledger.get, id)
    known = known or {etag(recovery)}
    while etag(recovery) in known and recovery.state not in TERMINAL_STATES and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_EVERY_SECONDS)
        recovery = await run_in_threadpool(ledger.get, id)
    return recovery


def etag(recovery: Recovery) -> str:
    return f'"{recovery.version}"'


def known_etags(if_none_match: str) -> set[str]:
    return set(re.findall(r'"[^"]*"', if_none_match))
