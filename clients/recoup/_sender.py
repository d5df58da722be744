"""What a resource needs of a client: to send a call, and to walk the pages of a list."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from recoup._calls import Call
from recoup.schemas import Page

T = TypeVar("T")


class Sender(Protocol):
    """Sends calls; `client.py` has the one over HTTP."""

    def send(self, call: Call[T]) -> T:
        """The parsed answer."""

    def stream(self, call: Call[Any], sink: Callable[[Iterator[bytes]], T]) -> T:
        """What `sink` makes of the answer's chunks."""


def pages(fetch: Callable[[str | None], Page[T]], after: str | None) -> Iterator[T]:
    """The items of all pages from `after` on; the next page is fetched when it is needed."""
    while True:
        page = fetch(after)
        yield from page.data
        if not page.has_more or page.next_cursor is None:
            return
        after = page.next_cursor
