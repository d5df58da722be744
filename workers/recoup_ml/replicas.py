"""Servers that serve the same model: who is asked next, who is left out, who comes back.

Each replica has a window of its own (`window.py`) and gets what comes next when it has the
smallest share of its window in use. A replica that breaks a connection, answers 5xx or is too
slow is asked for its health before it is given anything more; once it answers, and still
serves the same model, it is taken back. One that answers 429 or 503 is left alone for as long
as it asks for.

Nothing here knows what is asked: the rows are `vllm_engine.py`'s.
"""

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2
from opentelemetry import propagate

from recoup_ml.errors import TeacherUnavailable
from recoup_ml.window import Window

LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.2, 5.0
"""From one question for a lost replica's health to the next."""
HEALTH_TIMEOUT = 10.0
KEEPALIVE_SECONDS = 4.0
"""uvicorn hangs up after five idle seconds; a connection that is closed while it is used is a lost answer."""


@dataclass
class Replica:
    """One server, as far as it is known."""

    url: str
    client: httpx2.AsyncClient
    window: Window
    in_flight: int = 0
    lost: str | None = None
    """Why it is left out; None while it is not."""
    closed_until: float = 0.0
    """The time before which it asked not to be asked."""

    @property
    def load(self) -> float:
        return self.in_flight / self.window.limit

    def has_room(self, now: float) -> bool:
        return now >= self.closed_until and self.in_flight < self.window.limit


@dataclass(frozen=True)
class Served:
    """What all replicas must agree on."""

    model: str
    max_model_len: int | None
    """Longest sequence in tokens; None where the server does not say."""


class Replicas:
    """Open connections to all replicas; use as an asynchronous context manager.

    Raises:
        TeacherUnavailable: on entering, none of them serves a model.
    """

    def __init__(self, windows: dict[str, Window], timeout: float, patience: float) -> None:
        """`windows` by URL; `timeout` of an answer, `patience` without any replica, both in seconds."""
        self._windows, self._timeout, self._patience = windows, timeout, patience
        self._replicas: list[Replica] = []
        self._watchers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._answered_at = 0.0
        self.sated = True
        """Whether there is more to ask than the replicas have room for: only then do windows learn."""

    async def __aenter__(self) -> "Replicas":
        self._replicas = [
            Replica(url, _client(url, self._timeout), window) for url, window in self._windows.items()
        ]
        try:
            self.served = await self._first_served()
        except BaseException:
            await self._close()
            raise
        self._answered_at = time.monotonic()
        for replica in self._replicas:
            if replica.lost:
                self._watch(replica)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    @property
    def room(self) -> int:
        """How many requests all replicas that are well may have at a time; one may always wait."""
        return max(1, sum(replica.window.limit for replica in self._replicas if replica.lost is None))

    async def lease(self, avoided: Replica | None) -> Replica:
        """The replica to ask next, another than `avoided` where there is one; waits for room.

        It must be given back, by one of the methods below.

        Raises:
            TeacherUnavailable: there was no replica to wait for, for too long.
        """
        alone_since = None
        while True:
            now = time.monotonic()
            well = [replica for replica in self._replicas if replica.lost is None]
            others = [replica for replica in well if replica is not avoided] or well
            free = [replica for replica in others if replica.has_room(now)]
            if free:
                chosen = min(free, key=lambda replica: (replica.load, replica.in_flight))
                chosen.in_flight += 1
                return chosen
            alone_since = None if well else alone_since or now
            if alone_since and now - alone_since >= self._patience:
                raise TeacherUnavailable(self._reasons())
            await self._wait(now)

    def answered(self, replica: Replica, tokens: int) -> None:
        """Gives a replica back that answered with so many tokens."""
        self._answered_at = time.monotonic()
        if self.sated:
            replica.window.answered(tokens, self._answered_at)
        self._give_back(replica)

    def refused(self, replica: Replica, seconds: float, reason: str) -> None:
        """Gives a replica back that wants to be left alone for so long.

        Raises:
            TeacherUnavailable: nothing but refusals came for too long.
        """
        now = time.monotonic()
        if now - self._answered_at >= self._patience:
            raise TeacherUnavailable(reason)
        if now >= replica.closed_until:
            replica.window.refused()
        replica.closed_until = max(replica.closed_until, now + seconds)
        self._give_back(replica)

    def failed(self, replica: Replica, reason: str) -> None:
        """Gives a replica back that did not answer; it is left out until it is well, then asked for less."""
        if replica.lost is None:
            replica.lost = reason
            replica.window.refused()
            self._watch(replica)
        self._give_back(replica)

    def _give_back(self, replica: Replica) -> None:
        replica.in_flight -= 1
        self._changed.set()

    async def _wait(self, now: float) -> None:
        """Until something changed, a replica that was refusing may be asked, or a second is over."""
        soon = [replica.closed_until - now for replica in self._replicas if replica.closed_until > now]
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), min([1.0, *soon]))
        except TimeoutError:
            return

    async def _first_served(self) -> Served:
        """What the first replica that answers serves; those that serve anything else are left out."""
        found = await asyncio.gather(*(_served(replica) for replica in self._replicas))
        known = [served for served in found if isinstance(served, Served)]
        if not known:
            raise TeacherUnavailable(" ".join(str(reason) for reason in found))
        for replica, served in zip(self._replicas, found, strict=True):
            replica.lost = _objection(replica, served, known[0])
        return known[0]

    def _watch(self, replica: Replica) -> None:
        watcher = asyncio.create_task(self._until_well(replica))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _until_well(self, replica: Replica) -> None:
        pause = LOOK_SECONDS
        while not await _is_healthy(replica) or _objection(replica, await _served(replica), self.served):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK_SECONDS)
        replica.lost = None
        self._changed.set()

    def _reasons(self) -> str:
        return " ".join(replica.lost or "" for replica in self._replicas)

    async def _close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for replica in self._replicas:
            await replica.client.aclose()


def unanswered(url: str, path: str, error: object) -> str:
    """The sentence on a server that did not answer."""
    return (
        f"The teacher at {url} does not answer {path}: {error or type(error).__name__}. "
        "Check RECOUP_VLLM_URLS and the server's log."
    )


def _client(url: str, timeout: float) -> httpx2.AsyncClient:
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
    )
    headers: dict[str, str] = {}
    propagate.inject(headers)  # the trace that this recovery belongs to, if there is one
    patience = httpx2.Timeout(timeout, connect=10.0)
    return httpx2.AsyncClient(base_url=url, timeout=patience, limits=limits, headers=headers)


async def _is_healthy(replica: Replica) -> bool:
    """A server without /health is taken for well: it answers."""
    try:
        response = await replica.client.get("/health", timeout=HEALTH_TIMEOUT)
    except httpx2.HTTPError:
        return False
    return response.status_code in {200, 404}


async def _served(replica: Replica) -> Served | str:
    """The first model that the replica lists, or why there is none."""
    try:
        response = await replica.client.get("/v1/models", timeout=HEALTH_TIMEOUT)
        listed: list[dict[str, Any]] = response.raise_for_status().json()["data"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        return unanswered(replica.url, "/v1/models", error)
    if not listed:
        return f"The server at {replica.url} serves no model."
    return Served(str(listed[0]["id"]), listed[0].get("max_model_len"))


def _objection(replica: Replica, served: Served | str, wanted: Served) -> str | None:
    if isinstance(served, str):
        return served
    if served != wanted:
        return f"The server at {replica.url} serves {served}, the others {wanted}."
    return None
