"""The gateway: a request for a served model goes to a server that has it, and its answer comes back.

A name leads to the live deployment of the caller's tenant, a deployment to the servers on which the
reconciler proved it, and of those to the one that answers the fewest requests now. Servers know a deployment
by its id alone: an id that a server does not have is refused there, so that no base model ever answers in
its place. Where a server breaks off before it answers, another is asked. When all are full, callers are
told to come back. A client that leaves takes its request along: the connection to the server is closed,
which ends the work there.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx2
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from recoup.schemas import Deployment
from recoup_jobs.deployments import Deployments
from recoup_jobs.errors import BadRequest, NotFound, TooMany, Unavailable
from recoup_jobs.replica import address
from recoup_jobs.settings import Settings

T = TypeVar("T")

KNOWN_SECONDS = 1.0
"""For so long a deployment that was withdrawn may still answer."""
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""A connection that nobody uses is given up before a server gives it up."""
LONGEST_ANSWER = 64 << 20
LONGEST_WORDS = 500
CLIENT_LEFT = 499
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Prompted(Protocol):
    """A request for a served model."""

    @property
    def model(self) -> str: ...
    @property
    def stream(self) -> bool | None: ...
    def as_sent(self, model: str) -> dict[str, Any]: ...


@dataclass
class Line:
    """Connections to one server, and how many requests it answers for this process."""

    http: httpx2.AsyncClient
    busy: int = 0


@dataclass
class Upstream:
    """An answer that a server has begun."""

    line: Line
    response: httpx2.Response
    deployment: Deployment
    is_open: bool = True

    def named(self, content: bytes) -> bytes:
        """Under the name that the client knows; the id, which is as good as unique, stands nowhere else."""
        return content.replace(self.deployment.id.encode(), self.deployment.name.encode())

    async def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.line.busy -= 1
            await self.response.aclose()


class Gateway:
    """Holds the connections of this process to all servers."""

    def __init__(self, deployments: Deployments, settings: Settings) -> None:
        self._deployments, self._settings = deployments, settings
        self._lines = [self._line(url) for url in settings.serve_urls]
        self._known: dict[str, tuple[float, dict[str, Deployment]]] = {}

    async def close(self) -> None:
        for line in self._lines:
            await line.http.aclose()

    async def models(self, tenant: str) -> dict[str, Deployment]:
        """What the tenant has in service, by name."""
        until, known = self._known.get(tenant, (0.0, {}))
        if time.monotonic() >= until:
            found = await run_in_threadpool(self._deployments.serving, tenant)
            known = {deployment.name: deployment for deployment in found}
            self._known[tenant] = time.monotonic() + KNOWN_SECONDS, known
        return known

    async def model(self, tenant: str, name: str) -> Deployment:
        found = (await self.models(tenant)).get(name)
        if found is None:
            raise NotFound("model_not_found", "no deployment of this name is live; GET /v1/models lists them")
        return found

    async def answer(self, request: Request, tenant: str, path: str, asked: Prompted) -> Response:
        """What a server answers, whole or as it comes; nothing, where the client leaves before."""
        upstream = await unless_gone(request, self._asked(tenant, path, asked))
        if upstream is None:
            return Response(status_code=CLIENT_LEFT)
        if asked.stream:
            return Relay(upstream)
        try:
            content = await unless_gone(request, _whole(upstream.response))
        except httpx2.TimeoutException:
            raise _silent() from None
        except httpx2.TransportError:
            raise Unavailable("model_unavailable", "the server broke off its answer; try again") from None
        finally:
            await upstream.close()
        if content is None:
            return Response(status_code=CLIENT_LEFT)
        return Response(upstream.named(content), media_type="application/json")

    async def _asked(self, tenant: str, path: str, asked: Prompted) -> Upstream:
        """Asked again where the name has passed to another deployment meanwhile."""
        deployment = await self.model(tenant, asked.model)
        try:
            return await self._begun(deployment, path, asked)
        except Unavailable:
            self._known.pop(tenant, None)
            newer = await self.model(tenant, asked.model)
            if newer.id == deployment.id:
                raise
            return await self._begun(newer, path, asked)

    async def _begun(self, deployment: Deployment, path: str, asked: Prompted) -> Upstream:
        """The answer of the first server, least busy first, that takes the request."""
        ready = [self._lines[one.replica] for one in deployment.replicas if one.state == "ready"]
        full = False
        for line in sorted(ready, key=lambda line: line.busy):
            if line.busy >= self._settings.max_serving_requests:
                full = True
                continue
            upstream = await self._sent(line, deployment, path, asked.as_sent(deployment.id))
            if upstream is None:
                continue
            if upstream.response.is_success:
                return upstream
            full |= await _refused(upstream)
        if full:
            raise TooMany("overloaded", "every server of this model is busy; try again", 1)
        away = Unavailable("model_unavailable", "no server of this model answers now; try again")
        away.retry_after = 2
        raise away

    async def _sent(
        self, line: Line, deployment: Deployment, path: str, body: dict[str, Any]
    ) -> Upstream | None:
        """None where the server cannot be reached, or breaks off before it says anything."""
        line.busy += 1
        sent = False
        try:
            response = await line.http.send(line.http.build_request("POST", path, json=body), stream=True)
            sent = True
            return Upstream(line, response, deployment)
        except httpx2.ReadTimeout:
            raise _silent() from None
        except httpx2.TransportError:
            return None
        finally:
            if not sent:
                line.busy -= 1

    def _line(self, url: str) -> Line:
        base, socket = address(url)
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS)
        transport = httpx2.AsyncHTTPTransport(uds=socket, limits=limits)
        timeout = httpx2.Timeout(self._settings.answer_seconds, connect=CONNECT_SECONDS)
        headers = {"Accept-Encoding": "identity"}
        return Line(
            httpx2.AsyncClient(
                base_url=base, transport=transport, timeout=timeout, headers=headers, trust_env=False
            )
        )


class Relay(StreamingResponse):
    """Passes an answer on as it comes, a line at a time; closes it however the client's own ends."""

    def __init__(self, upstream: Upstream) -> None:
        super().__init__(_lines(upstream), headers=STREAM, media_type="text/event-stream")
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.close()


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` gives; None, and no work any more, once the client has left."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.wait({doing, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _whole(response: httpx2.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > LONGEST_ANSWER:
            raise Unavailable(
                "answer_too_long", f"the answer has more than {LONGEST_ANSWER} bytes; stream it"
            )
    return b"".join(parts)


async def _lines(upstream: Upstream) -> AsyncIterator[bytes]:
    rest = b""
    try:
        async for part in upstream.response.aiter_raw():
            whole, end, rest = (rest + part).rpartition(b"\n")
            if end:
                yield upstream.named(whole + end)
    except httpx2.TransportError:
        error = {"message": "the server broke off its answer", "type": "server_error", "param": None}
        yield f"data: {json.dumps({'error': error | {'code': 'model_unavailable'}})}\n\n".encode()
        return
    yield upstream.named(rest)


async def _refused(upstream: Upstream) -> bool:
    """Whether the server is only busy; raises `BadRequest` where it is the request that it does not take."""
    status = upstream.response.status_code
    try:
        content = await upstream.response.aread()
    except httpx2.TransportError:
        content = b""
    finally:
        await upstream.close()
    if status in {400, 413, 422}:
        words = upstream.named(_words(content).encode()).decode()
        raise BadRequest("invalid_request", f"the model does not take this: {words}")
    return status in {429, 503}


def _words(content: bytes) -> str:
    try:
        told = json.loads(content)["error"]
        return str(told["message"] if isinstance(told, dict) else told)[:LONGEST_WORDS]
    except (ValueError, KeyError, TypeError):
        return "it does not say why"


def _silent() -> Unavailable:
    return Unavailable("answer_timeout", "the server was silent for too long; ask for fewer tokens")
