"""`Client` and `AsyncClient`: a connection to one Recoup server, and its resources.

    with Client() as client:
        job = client.recoveries.create(student="my-damaged-model", teacher="its-original")
        done = client.recoveries.wait(job.id)
        print(done.outcome, client.recoveries.report(done.id).reason)

    async with AsyncClient() as client:
        async for event in client.recoveries.events(job.id):
            print(event.type, event.data)

Both have the same methods, since both are made of the same descriptions (`_calls.py`) and
the same flows (`_follow.py`, `_download.py`); `_http.py` sends them.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from recoup import _calls
from recoup._http import Async, RawAsync, RawSync, Sync, connect, connect_async
from recoup._resource import Sends
from recoup.deployments import Deployments
from recoup.diagnoses import Diagnoses
from recoup.files import Files
from recoup.recoveries import Recoveries

M = TypeVar("M")


class Client:
    """A connection to one Recoup server. Close it, or use it in a `with` statement."""

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
        self._use(connect(base_url, api_key, timeout, max_retries))

    def _use(self, driver: Sync) -> None:
        self._driver = driver
        self.recoveries = Recoveries(driver)
        self.diagnoses = Diagnoses(driver)
        self.deployments = Deployments(driver)
        self.files = Files(driver)

    capabilities = Sends(_calls.get_capabilities)
    ready = Sends(_calls.get_readiness)

    @property
    def base_url(self) -> str:
        """The server's address, without a user or a password in it."""
        return self._driver.origin

    @property
    def with_raw_response(self) -> Resources[RawSync]:
        """The same methods, which give status, headers and bytes as a `RawResponse`."""
        return Resources(RawSync(self._driver))

    def with_options(self, *, timeout: float | None = None, max_retries: int | None = None) -> Client:
        """A client that shares this one's connections, with another patience."""
        other = Client.__new__(Client)
        other._use(replace(self._driver, settings=self._driver.settings.changed(timeout, max_retries)))
        return other

    def close(self) -> None:
        """Close the connections, also those of clients made by `with_options`."""
        self._driver.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for an event loop of asyncio: calls are awaited, lists and events are `async for`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
    ) -> None:
        """As of `Client`."""
        self._use(connect_async(base_url, api_key, timeout, max_retries))

    def _use(self, driver: Async) -> None:
        self._driver = driver
        self.recoveries = Recoveries(driver)
        self.diagnoses = Diagnoses(driver)
        self.deployments = Deployments(driver)
        self.files = Files(driver)

    capabilities = Sends(_calls.get_capabilities)
    ready = Sends(_calls.get_readiness)

    @property
    def base_url(self) -> str:
        """The server's address, without a user or a password in it."""
        return self._driver.origin

    @property
    def with_raw_response(self) -> Resources[RawAsync]:
        """The same methods, which give status, headers and bytes as a `RawResponse`."""
        return Resources(RawAsync(self._driver))

    def with_options(self, *, timeout: float | None = None, max_retries: int | None = None) -> AsyncClient:
        """A client that shares this one's connections, with another patience."""
        other = AsyncClient.__new__(AsyncClient)
        other._use(replace(self._driver, settings=self._driver.settings.changed(timeout, max_retries)))
        return other

    async def close(self) -> None:
        """Close the connections, also those of clients made by `with_options`."""
        await self._driver.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Resources(Generic[M]):
    """What a client has, sent in another way."""

    def __init__(self, driver: M) -> None:
        self._driver = driver
        self.recoveries = Recoveries(driver)
        self.diagnoses = Diagnoses(driver)
        self.deployments = Deployments(driver)
        self.files = Files(driver)

    capabilities = Sends(_calls.get_capabilities)
    ready = Sends(_calls.get_readiness)
