"""Parameters of a query are taken as the route documents them, once each; others are refused by name."""

from fastapi import Request
from fastapi.routing import APIRoute

from recoup.schemas import ProblemItem
from recoup_jobs.errors import Unprocessable
from recoup_jobs.findings import pointer


async def known_query(request: Request) -> None:
    """A dependency of every route."""
    if not request.scope["query_string"]:
        return
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    sent = [name for name, _ in request.query_params.multi_items()]
    for name in sent:
        if name not in known:
            raise _refused(name, "unknown_parameter", f"this route knows {_listed(known)}")
        if sent.count(name) > 1:
            raise _refused(name, "invalid_value", "the same parameter stands here more than once")


def _listed(known: set[str]) -> str:
    return ", ".join(sorted(known)) or "no parameters"


def _refused(name: str, code: str, message: str) -> Unprocessable:
    item = ProblemItem(pointer=pointer(("query", name)), code=code, message=message)
    return Unprocessable(code, f"{item.pointer}: {message}", [item])
