"""`Client`: sends the calls of `_calls.py` over HTTP. The only module that knows the HTTP library.

    with Client() as client:
        job = client.recoveries.create(student="my-damaged-model", teacher="its-original")
        done = client.recoveries.wait(job.id)
        print(done.outcome, client.recoveries.report(done.id).reason)

What is worth another try is decided in `_retry.py`, what an error is called in
`errors.py`. This module opens the connection, waits, and translates between the two.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypeVar

import httpx2
from pydantic import ValidationError

from recoup import __version__, _calls, _retry, errors
from recoup._calls import Call
from recoup.diagnoses import Diagnoses
from recoup.files import Files
from recoup.recoveries import Recoveries
from recoup.schemas import Capabilities

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8321"


class Client:
    """A connection to one Recoup server. Close it, or use it in a `with` statement."""

    recoveries: Recoveries
    diagnoses: Diagnoses
    files: Files

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
    ) -> None:
        """`base_url` and `api_key` default to RECOUP_BASE_URL and RECOUP_API_KEY of the environment.

        `timeout`: seconds of silence after which a call gives up (5 at most to connect).
        Raises InvalidArgumentError on an address or a key that could not be used.
        """
        address = _address(base_url or os.environ.get("RECOUP_BASE_URL") or DEFAULT_BASE_URL)
        key = api_key or os.environ.get("RECOUP_API_KEY")
        self._http = httpx2.Client(
            base_url=address,
            headers=_headers(key),
            mounts=_NO_PROXY_TO_LOOPBACK,
        )
        self._sender = _Sender(self._http, timeout, max_retries)
        self.recoveries = Recoveries(self._sender)
        self.diagnoses = Diagnoses(self._sender)
        self.files = Files(self._sender)

    def capabilities(self) -> Capabilities:
        """What this installation can do."""
        return self._sender.send(_calls.get_capabilities())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Sender:
    """Sends a call, again where that is safe, and raises the errors of `errors.py`."""

    http: httpx2.Client
    timeout: float
    max_retries: int
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random

    def send(self, call: Call[T]) -> T:
        """The parsed answer. Raises APIStatusError, APIConnectionError or InvalidAnswerError."""
        body = self.stream(call, b"".join)
        try:
            return call.parse(body)
        except ValidationError as error:
            raise errors.InvalidAnswerError(
                f"{_origin(self.http)} answered {call.method} {call.path} with something that this client "
                f"({__version__}) cannot read. Is it a Recoup server, and of this version?"
            ) from error

    def stream(self, call: Call[Any], sink: Callable[[Iterator[bytes]], T]) -> T:
        """What `sink` makes of the answer's chunks; each new try starts it anew."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._try(call, sink)
            except _FailedTryError as tried:
                again = _retry.is_worth_another_try(call.method, tried.failure)
                if attempt > self.max_retries or not again:
                    raise tried.error from tried.__cause__
                asked = _retry.seconds_of(tried.failure.retry_after, datetime.now(UTC))
                self.sleep(_retry.delay(attempt, self.jitter(), asked))

    def _try(self, call: Call[Any], sink: Callable[[Iterator[bytes]], T]) -> T:
        try:
            with self._answer(call) as response:
                if response.is_success or response.status_code == 304:
                    return sink(response.iter_bytes())
                body = response.read()
        except httpx2.RequestError as error:
            sent = not isinstance(error, _UNSENT)
            raise _FailedTryError(self._connection_error(error), _retry.Failure(None, sent)) from error
        problem = errors.problem_of(response.status_code, body, response.headers.get("x-request-id", ""))
        failure = _retry.Failure(problem.status, sent=True, retry_after=response.headers.get("retry-after"))
        raise _FailedTryError(errors.status_error(problem), failure)

    @contextmanager
    def _answer(self, call: Call[Any]) -> Iterator[httpx2.Response]:
        with _form(call) as form:
            request = self.http.build_request(
                call.method,
                call.path,
                params=call.query,
                headers=dict(call.headers),
                json=call.json,
                timeout=httpx2.Timeout(self.timeout + call.hold, connect=min(self.timeout, 5.0)),
                **form,
            )
            response = self.http.send(request, stream=True)
            try:
                yield response
            finally:
                response.close()

    def _connection_error(self, error: httpx2.RequestError) -> errors.APIConnectionError:
        where = _origin(self.http)
        if isinstance(error, httpx2.TimeoutException):
            return errors.APITimeoutError(f"{where} did not answer in time.")
        if isinstance(error, _UNSENT):
            return errors.APIConnectionError(f"Cannot reach {where} ({error}). Is the server running?")
        why = str(error) or type(error).__name__
        return errors.APIConnectionError(f"The connection to {where} broke ({why}).")


class _FailedTryError(Exception):
    """One try that failed: what to tell the caller, and what decides about the next."""

    def __init__(self, error: errors.RecoupError, failure: _retry.Failure) -> None:
        super().__init__(error, failure)
        self.error = error
        self.failure = failure


_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_NO_PROXY_TO_LOOPBACK: Mapping[str, None] = {
    f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")
}


@contextmanager
def _form(call: Call[Any]) -> Iterator[dict[str, Any]]:
    """The form fields of an upload; the file is open only while it is sent."""
    if call.upload is None:
        yield {}
        return
    with call.upload.path.open("rb") as content:
        file = (call.upload.path.name, content, "application/jsonl")
        yield {"data": {"purpose": call.upload.purpose}, "files": {"file": file}}


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
    if key is None:
        return headers
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise errors.InvalidArgumentError("The API key holds a space, a line end or another odd character.")
    return headers | {"Authorization": f"Bearer {key}"}


def _origin(http: httpx2.Client) -> str:
    """The server's address without a user or a password in it."""
    return f"{http.base_url.scheme}://{http.base_url.netloc.decode('ascii')}"
