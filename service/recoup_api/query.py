"""Parameters of a query are taken as the route documents them, once each; others are refused by name."""

import re
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from recoup.schemas import ProblemItem
from recoup_jobs.errors import Unprocessable
from recoup_jobs.findings import pointer

MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
"""As of a job's own metadata."""
PAIR = re.compile(r"metadata\[(.*)\]", re.DOTALL)
METADATA_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "`metadata[key]=value`: only jobs that have this pair; may be repeated.",
            "schema": {
                "type": "object",
                "maxProperties": MOST_PAIRS,
                "propertyNames": {"minLength": 1, "maxLength": LONGEST_KEY},
                "additionalProperties": {"type": "string", "maxLength": LONGEST_VALUE},
            },
        }
    ]
}
"""Of a route that filters by metadata: its `openapi_extra`."""


async def known_query(request: Request) -> None:
    """A dependency of every route."""
    if not request.scope["query_string"]:
        return
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    filters = bool((route.openapi_extra or {}).get("parameters"))
    sent = [name for name, _ in request.query_params.multi_items()]
    for name in sent:
        if name not in known and not (filters and PAIR.fullmatch(name)):
            raise _refused(name, "unknown_parameter", f"this route knows {_listed(known)}")
        if sent.count(name) > 1:
            raise _refused(name, "invalid_value", "the same parameter stands here more than once")


async def _metadata(request: Request) -> tuple[tuple[str, str], ...]:
    """The pairs of `metadata[key]=value`, in order of their keys."""
    found = [(PAIR.fullmatch(name), name, value) for name, value in request.query_params.multi_items()]
    pairs = [(match.group(1), name, value) for match, name, value in found if match]
    if len(pairs) > MOST_PAIRS:
        raise _refused("metadata", "invalid_value", f"{MOST_PAIRS} pairs at most")
    for key, name, value in pairs:
        if not 1 <= len(key) <= LONGEST_KEY or len(value) > LONGEST_VALUE or "\x00" in key + value:
            sizes = f"1 to {LONGEST_KEY} characters of a key, {LONGEST_VALUE} of a value at most"
            raise _refused(name, "invalid_value", f"{sizes}, and no NUL")
    return tuple(sorted((key, value) for key, _, value in pairs))


MetadataWanted = Annotated[tuple[tuple[str, str], ...], Depends(_metadata)]


def _listed(known: set[str]) -> str:
    return ", ".join(sorted(known)) or "no parameters"


def _refused(name: str, code: str, message: str) -> Unprocessable:
    item = ProblemItem(pointer=pointer(("query", name)), code=code, message=message)
    return Unprocessable(code, f"{item.pointer}: {message}", [item])
