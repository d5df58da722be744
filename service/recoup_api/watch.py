"""Watching jobs: long polls and event streams; the ledger is looked at once a tick, not once a watcher.

A watcher joins the job's feed and sleeps until the feed moves. Nobody holds a thread while waiting. Events
are a table, so that a stream goes on exactly where the last one broke (`Last-Event-ID`).
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from recoup.schemas import Event, Recovery
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_api.threads import in_thread
from recoup_jobs.ledger import Ledger
from recoup_jobs.looking import Standing, standings

LOOK_EVERY_SECONDS = 0.25
PING_EVERY_SECONDS = 15.0
PAGE = 500
END = b"event: end\ndata: {}\n\n"
PING = b": ping\n\n"


@dataclass
class Feed:
    """What is known of one watched job."""

    watchers: int = 0
    standing: Standing | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    recent: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=PAGE))
    """The newest events without gaps, as they go over the wire."""


class Watch:
    """Holds the feeds of this process, and the task that looks for all of them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._feeds: dict[str, Feed] = {}
        self._looking: asyncio.Task[None] | None = None

    async def newer(self, recovery: Recovery, known: set[str], wait_seconds: float) -> Recovery:
        """The recovery once its ETag is not `known`, or it has ended, or the wait is over.

        With nothing known, what is new counts from `recovery` on, as it was read a moment ago.
        """
        known = known or {etag(recovery)}
        deadline = time.monotonic() + wait_seconds
        with self._joined(recovery.id) as feed:
            while etag(recovery) in known and recovery.state not in TERMINAL_STATES:
                if not await _moves(feed, deadline - time.monotonic()):
                    break
                recovery = await in_thread(self._ledger.get, recovery.id)
        return recovery

    async def stream(self, id: str, after: int) -> AsyncIterator[bytes]:
        """Server-sent events from number `after` on, to the end of the job."""
        with self._joined(id) as feed:
            while True:
                moved = feed.moved
                async for seq, sent in self._since(id, feed, after):
                    yield sent
                    after = seq
                if _is_over(feed.standing, after):
                    yield END
                    return
                if moved is feed.moved and not await _moves(feed, PING_EVERY_SECONDS):
                    yield PING

    async def _since(self, id: str, feed: Feed, after: int) -> AsyncIterator[tuple[int, bytes]]:
        """From the feed, where it reaches back so far; else from the ledger."""
        while not (feed.standing and after >= feed.standing.last_seq):
            if feed.recent and feed.recent[0][0] <= after + 1:
                fresh = [item for item in feed.recent if item[0] > after]
            else:
                fresh = await in_thread(self._read, id, after)
            for item in fresh:
                yield item
                after = item[0]
            if not fresh:
                return

    def _read(self, id: str, after: int) -> list[tuple[int, bytes]]:
        return [(event.seq, _sent(event)) for event in self._ledger.events(id, after, PAGE).data]

    @contextmanager
    def _joined(self, id: str) -> Iterator[Feed]:
        feed = self._feeds.setdefault(id, Feed())
        feed.watchers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers:
                self._feeds.pop(id, None)

    async def _look(self) -> None:
        while self._feeds:
            try:
                found = await in_thread(standings, self._ledger, [*self._feeds])
                for id, standing in found.items():
                    await self._move(id, standing)
            except (OperationalError, PoolTimeout):
                pass  # the database is away; watchers wait on
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def _move(self, id: str, standing: Standing) -> None:
        feed = self._feeds.get(id)
        if feed is None or feed.standing == standing:
            return
        if feed.standing and standing.last_seq > feed.standing.last_seq:
            feed.recent.extend(await in_thread(self._read, id, feed.standing.last_seq))
            if feed.recent[-1][0] < standing.last_seq:  # too many at once: watchers read the ledger
                feed.recent.clear()
        feed.standing = standing
        feed.moved, moved = asyncio.Event(), feed.moved
        moved.set()


def _is_over(standing: Standing | None, after: int) -> bool:
    return standing is not None and standing.state in TERMINAL_STATES and after >= standing.last_seq


async def _moves(feed: Feed, seconds: float) -> bool:
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await feed.moved.wait()
    except TimeoutError:
        return False


def _sent(event: Event) -> bytes:
    return f"id: {event.seq}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


def etag(recovery: Recovery) -> str:
    return f'"{recovery.version}"'


def known_etags(if_none_match: str) -> set[str]:
    return set(re.findall(r'"[^"]*"', if_none_match))
