"""Pages of a list: one row more than asked for tells whether there is another page."""

from collections.abc import Callable
from typing import TypeVar

from recoup.schemas import Page

T = TypeVar("T")


def page(found: list[T], limit: int, cursor: Callable[[T], str]) -> Page[T]:
    """`found` holds up to `limit + 1` rows; the cursor is that of the last one shown."""
    shown = found[:limit]
    has_more = len(found) > limit
    return Page(
        object="list", data=shown, has_more=has_more, next_cursor=cursor(shown[-1]) if has_more else None
    )
