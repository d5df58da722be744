"""Two drivers of flows over HTTP: `Sync` on the calling thread, `Async` on an event loop.

The only module that knows the HTTP library. A driver performs one effect after another;
what to do next, and whether to try again, the flow decides (`_flow.py`).
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import httpx2

from recoup import __version__, errors
from recoup._calls import Call
from recoup._flow import (
    Done,
    Effect,
    Emit,
    Flow,
    Head,
    Open,
    RawResponse,
    Read,
    Run,
    Send,
    Sleep,
    Tell,
    Unanswered,
    advance,
)
from recoup._flow import send as sent
from recoup._follow import pages
from recoup._sending import sending

if TYPE_CHECKING:
    from recoup.schemas import Page

T = TypeVar("T")


class Settings(NamedTuple):
    """How a client sends."""

    timeout: float
    """Seconds of silence after which a call gives up; at most 5 of them to connect."""
    max_retries: int

    def changed(self, timeout: float | None, max_retries: int | None) -> Settings:
        """These, but for what is given."""
        return Settings(
            self.timeout if timeout is None else timeout,
            self.max_retries if max_retries is None else max_retries,
        )


def connect(base_url: str | None, api_key: str | None, timeout: float, max_retries: int) -> Sync:
    """A driver on connections of its own."""
    address, headers = _server(base_url, api_key)
    http = httpx2.Client(base_url=address, headers=headers, mounts=_NO_PROXY_TO_LOOPBACK)
    return Sync(http, Settings(timeout, max_retries))


def connect_async(base_url: str | None, api_key: str | None, timeout: float, max_retries: int) -> Async:
    """A driver on connections of its own."""
    address, headers = _server(base_url, api_key)
    http = httpx2.AsyncClient(base_url=address, headers=headers, mounts=_NO_PROXY_TO_LOOPBACK)
    return Async(http, Settings(timeout, max_retries))


@dataclass(frozen=True)
class Sync:
    """Performs the effects of flows, and blocks meanwhile."""

    http: httpx2.Client
    settings: Settings

    @property
    def origin(self) -> str:
        return _origin(self.http)

    def send(self, call: Call[T]) -> T:
        return self.run(sent(call))

    def raw(self, call: Call[T]) -> RawResponse[T]:
        return self.run(sending(call, self.origin, self.settings.max_retries))

    def pages(self, call: Call[Page[T]]) -> Iterator[T]:
        return self.emitted(pages(call))

    def run(self, flow: Flow[T]) -> T:
        """What the flow returns."""
        with closing(self._steps(flow)) as steps:
            *_, done = steps
        value: T = done.value
        return value

    def emitted(self, flow: Flow[None]) -> Generator[Any, None, None]:
        """What the flow emits."""
        with closing(self._steps(flow)) as steps:
            for step in steps:
                if isinstance(step, Emit):
                    yield step.value

    def _steps(self, flow: Flow[Any]) -> Generator[Emit | Done, None, None]:
        """All that the flow emits, then what it returns."""
        with closing(flow), ExitStack() as stack:
            line = _Line(self, stack)
            step = advance(flow)
            while not isinstance(step, Done):
                if isinstance(step, Emit):
                    yield step
                    step = advance(flow)
                    continue
                try:
                    reply = line.perform(step)
                except (errors.RecoupError, Unanswered) as error:
                    step = advance(flow, error=error)
                else:
                    step = advance(flow, reply)
            yield step


@dataclass
class _Line:
    """Performs one effect after another for a flow; one answer is open at a time."""

    driver: Sync
    stack: ExitStack
    chunks: Iterator[bytes] = field(init=False)

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Send(call):
                return self.driver.raw(call)
            case Open(call):
                return self._open(call)
            case Read():
                return self._read()
            case Sleep(seconds):
                time.sleep(seconds)
            case Run(work):
                return work()
            case Tell(callback, value):
                callback(value)
        return None

    def _open(self, call: Call[Any]) -> Head:
        self.stack.close()
        request = _request(self.driver.http, call, self.driver.settings, self.stack)
        with _unanswered(self.driver.http):
            response = self.driver.http.send(request, stream=True)
        self.stack.callback(response.close)
        self.chunks = response.iter_bytes()
        return Head(response.status_code, response.headers)

    def _read(self) -> bytes:
        with _unanswered(self.driver.http):
            return next(self.chunks, b"")


@dataclass(frozen=True)
class Async:
    """Performs the effects of flows, and lets others run meanwhile. Needs asyncio."""

    http: httpx2.AsyncClient
    settings: Settings

    @property
    def origin(self) -> str:
        return _origin(self.http)

    async def send(self, call: Call[T]) -> T:
        return await self.run(sent(call))

    async def raw(self, call: Call[T]) -> RawResponse[T]:
        return await self.run(sending(call, self.origin, self.settings.max_retries))

    def pages(self, call: Call[Page[T]]) -> AsyncIterator[T]:
        return self.emitted(pages(call))

    async def run(self, flow: Flow[T]) -> T:
        """What the flow returns."""
        async with aclosing(self._steps(flow)) as steps:
            *_, done = [step async for step in steps]
        value: T = done.value
        return value

    async def emitted(self, flow: Flow[None]) -> AsyncGenerator[Any, None]:
        """What the flow emits."""
        async with aclosing(self._steps(flow)) as steps:
            async for step in steps:
                if isinstance(step, Emit):
                    yield step.value

    async def _steps(self, flow: Flow[Any]) -> AsyncGenerator[Emit | Done, None]:
        """All that the flow emits, then what it returns."""
        with closing(flow):
            async with AsyncExitStack() as stack:
                line = _AsyncLine(self, stack)
                step = advance(flow)
                while not isinstance(step, Done):
                    if isinstance(step, Emit):
                        yield step
                        step = advance(flow)
                        continue
                    try:
                        reply = await line.perform(step)
                    except (errors.RecoupError, Unanswered) as error:
                        step = advance(flow, error=error)
                    else:
                        step = advance(flow, reply)
                yield step


@dataclass
class _AsyncLine:
    """Performs one effect after another for a flow; one answer is open at a time."""

    driver: Async
    stack: AsyncExitStack
    chunks: AsyncIterator[bytes] = field(init=False)

    async def perform(self, effect: Effect) -> Any:
        import asyncio  # costs every importer of this module otherwise; here it is loaded already

        match effect:
            case Send(call):
                return await self.driver.raw(call)
            case Open(call):
                return await self._open(call)
            case Read():
                return await self._read()
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Run(work):
                return await asyncio.to_thread(work)
            case Tell(callback, value):
                answer = callback(value)
                if inspect.isawaitable(answer):
                    await answer
        return None

    async def _open(self, call: Call[Any]) -> Head:
        await self.stack.aclose()
        request = _request(self.driver.http, call, self.driver.settings, self.stack)
        with _unanswered(self.driver.http):
            response = await self.driver.http.send(request, stream=True)
        self.chunks = chunks = response.aiter_bytes()
        self.stack.push_async_callback(response.aclose)
        self.stack.push_async_callback(chunks.aclose)
        return Head(response.status_code, response.headers)

    async def _read(self) -> bytes:
        with _unanswered(self.driver.http):
            return await anext(self.chunks, b"")


@dataclass(frozen=True)
class RawSync:
    """Sends single calls, and gives their answers as they came."""

    driver: Sync

    def send(self, call: Call[T]) -> RawResponse[T]:
        return self.driver.raw(call)

    pages = send


@dataclass(frozen=True)
class RawAsync:
    """Sends single calls, and gives their answers as they came."""

    driver: Async

    async def send(self, call: Call[T]) -> RawResponse[T]:
        return await self.driver.raw(call)

    pages = send


_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_NO_PROXY_TO_LOOPBACK: Mapping[str, None] = {
    f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")
}
DEFAULT_BASE_URL = "http://127.0.0.1:8321"


def _server(base_url: str | None, api_key: str | None) -> tuple[httpx2.URL, dict[str, str]]:
    """The server's address, and the headers of every request; both may come from the environment."""
    address = _address(base_url or os.environ.get("RECOUP_BASE_URL") or DEFAULT_BASE_URL)
    return address, _headers(api_key or os.environ.get("RECOUP_API_KEY"))


def _address(base_url: str) -> httpx2.URL:
    try:
        address = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise errors.InvalidArgumentError(f"The server's address is no URL: {error}.") from error
    if address.scheme not in {"http", "https"} or not address.host:
        raise errors.InvalidArgumentError(
            f"The server's address must begin with http:// or https:// and name a host; found {base_url!r}."
        )
    return address


def _headers(key: str | None) -> dict[str, str]:
    headers = {"User-Agent": f"recoup-python/{__version__}"}
    if not key:
        return headers
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise errors.InvalidArgumentError("The API key holds a space, a line end or another odd character.")
    return headers | {"Authorization": f"Bearer {key}"}


def _origin(http: httpx2.Client | httpx2.AsyncClient) -> str:
    """The server's address without a user or a password in it."""
    return f"{http.base_url.scheme}://{http.base_url.netloc.decode('ascii')}"


def _request(
    http: httpx2.Client | httpx2.AsyncClient,
    call: Call[Any],
    settings: Settings,
    stack: ExitStack | AsyncExitStack,
) -> httpx2.Request:
    """The request of a call. The file of an upload stays open until the stack is closed."""
    headers = dict(call.headers)
    form: dict[str, Any] = {}
    if call.upload is not None:
        content = stack.enter_context(call.upload.path.open("rb"))
        file = (call.upload.path.name, content, "application/jsonl")
        form = {"data": {"purpose": call.upload.purpose}, "files": {"file": file}}
        # The same bytes in each try, as idempotency asks for.
        headers["Content-Type"] = f"multipart/form-data; boundary={call.key}"
    silence = settings.timeout + call.hold
    return http.build_request(
        call.method,
        call.path,
        params=call.query,
        headers=headers,
        json=call.json,
        timeout=httpx2.Timeout(silence, connect=min(settings.timeout, 5.0)),
        **form,
    )


@contextmanager
def _unanswered(http: httpx2.Client | httpx2.AsyncClient) -> Iterator[None]:
    """Errors of the HTTP library in this package's words."""
    try:
        yield
    except httpx2.RequestError as error:
        told = _connection_error(error, _origin(http))
        told.__cause__ = error
        raise Unanswered(told, sent=not isinstance(error, _UNSENT)) from error


def _connection_error(error: httpx2.RequestError, where: str) -> errors.APIConnectionError:
    if isinstance(error, httpx2.TimeoutException):
        return errors.APITimeoutError(f"{where} did not answer in time.")
    if isinstance(error, _UNSENT):
        return errors.APIConnectionError(f"Cannot reach {where} ({error}). Is the server running?")
    why = str(error) or type(error).__name__
    return errors.APIConnectionError(f"The connection to {where} broke ({why}).")
