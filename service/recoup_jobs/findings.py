"""Findings: what is wrong with an input, each with the place where it stands.

Pydantic says what is wrong with a value; here that becomes `ProblemItem`s whose JSON
pointers (RFC 6901) match what the client sent: the names that pydantic gives to the
members of a union are not part of it. Values are never echoed.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from recoup.schemas import ProblemItem
from recoup_jobs.errors import RecoupError, Unprocessable

MOST_ITEMS = 100
LONGEST_POINTER = 200

Loc = Sequence[int | str]


class Findings:
    """Collects the errors of many checks, so that one answer names them all."""

    def __init__(self) -> None:
        self.items: list[ProblemItem] = []

    @contextmanager
    def at(self, pointer: str) -> Iterator[None]:
        """An error that rises in this block becomes a finding about that place."""
        try:
            yield
        except RecoupError as error:
            self.items.append(ProblemItem(pointer=pointer, code=error.code, message=error.message))

    def raise_if_any(self) -> None:
        refuse(self.items)


def refuse(items: Sequence[ProblemItem]) -> None:
    """Raises `Unprocessable` if there is anything to refuse."""
    if items:
        first = items[0]
        raise Unprocessable(first.code, f"{first.pointer}: {first.message}", items)


def items_of(error: ValidationError, sent: Any) -> list[ProblemItem]:
    """One finding a place. Where a value fits no member of a union, the complaints are joined, or the
    one that looks deepest into the value stands for all.
    """
    found: dict[str, ProblemItem] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        place = pointer(_sent_part(detail["loc"], sent, detail["type"] == "missing"))
        code = _code(detail["type"], detail["loc"])
        message = detail["msg"] if place not in found else f"{found[place].message}, or: {detail['msg']}"
        found[place] = ProblemItem(pointer=place, code=code, message=message)
    told = list(found.values())[:MOST_ITEMS]
    return [item for item in told if not any(_is_above(item, other) for other in told)]


def _code(complaint: str, loc: Loc) -> str:
    if complaint == "extra_forbidden":
        return "unknown_field"
    is_reference = complaint == "string_pattern_mismatch" and loc[-1] == "source"
    return "invalid_model_ref" if is_reference else "invalid_value"


def _is_above(item: ProblemItem, other: ProblemItem) -> bool:
    return other.pointer.startswith(f"{item.pointer}/")


def pointer(loc: Loc) -> str:
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in loc)
    return "".join(f"/{part}" for part in parts)[:LONGEST_POINTER]


def _sent_part(loc: Loc, sent: Any, missing: bool) -> Loc:
    """Follows `loc` into what was sent and drops the parts that lead nowhere."""
    if loc[:1] == ("prompts",):
        loc = (*loc[:1], *loc[2:])  # the tag of the union of prompt sources
    kept: list[int | str] = []
    here: Any = sent
    for index, part in enumerate(loc):
        if part in _places(here):
            here = here[part]
            kept.append(part)
        elif missing and index == len(loc) - 1:
            kept.append(part)
    return kept


def _places(value: Any) -> Collection[int | str]:
    if isinstance(value, dict):
        return value.keys()
    return range(len(value)) if isinstance(value, list) else ()
