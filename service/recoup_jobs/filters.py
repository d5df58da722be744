"""Which jobs a list is of. What a request says is read from the JSON text that was accepted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, String, Text, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from recoup.schemas import Outcome, State
from recoup_jobs.tables import jobs


@dataclass(frozen=True)
class Wanted:
    """All that is given must hold."""

    state: State | None = None
    outcome: Outcome | None = None
    damage: str | None = None
    """As it stands in the request, `auto` included."""
    metadata: tuple[tuple[str, str], ...] = ()

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        if self.state is not None:
            yield jobs.c.state == self.state
        if self.outcome is not None:
            yield jobs.c.outcome == self.outcome
        if self.damage is not None:
            yield _said(jobs.c.request, _text("damage")) == self.damage
        for key, value in self.metadata:
            yield _said(jobs.c.request, _text("metadata"), _text(key)) == value


EVERY = Wanted()


def _text(value: str) -> ColumnElement[str]:
    return bindparam(None, value, Text())


class _said(FunctionElement[str]):  # noqa: N801 - an SQL function
    """The text that a JSON object, kept as text, has at one key, or at one key below another."""

    type = String()
    inherit_cache = True


@compiles(_said, "sqlite")
def _sqlite_said(element: Any, compiler: Any, **options: Any) -> str:
    """By comparison, since a path of SQLite's has no way to quote every key."""
    place, *keys = (compiler.process(part, **options) for part in element.clauses)
    last = keys.pop()
    inside = f", '$.' || {keys[0]}" if keys else ""
    return f"(SELECT value FROM json_each({place}{inside}) WHERE key = {last})"


@compiles(_said, "postgresql")
def _postgresql_said(element: Any, compiler: Any, **options: Any) -> str:
    place, *keys = (compiler.process(part, **options) for part in element.clauses)
    return f"(CAST({place} AS jsonb) #>> ARRAY[{', '.join(f'CAST({key} AS text)' for key in keys)}])"
