"""Reads JSON bodies: in UTF-8, of bounded size and depth, exactly as the contract says.

FastAPI's own way would hand pydantic a value that `json` has read, NaN, coercions and the last of
two equal keys included; here `strict_json` reads the bytes. Their number is bounded by `limit.py`.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from recoup.schemas import ChangeRecovery, CreateDiagnosis, CreateRecovery, ProblemItem
from recoup_jobs import strict_json
from recoup_jobs.errors import Unprocessable, UnsupportedMedia
from recoup_jobs.findings import MOST_ITEMS, items_of, pointer, refuse
from recoup_jobs.scrubber import places_of_secrets

M = TypeVar("M", bound=BaseModel)

JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)


def body_of(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads the request's body as `model`."""

    async def read(request: Request) -> M:
        return parse(model, await _json(request))

    return read


def parse(model: type[M], raw: bytes) -> M:
    """Raises `BadRequest` for what is no JSON, `Unprocessable` for what is not in the contract."""
    if not raw.strip():
        raise Unprocessable("body_required", "the body is empty; it must be a JSON object")
    value = strict_json.read(raw)
    try:
        read = model.model_validate(value)
    except ValidationError as error:
        refuse(items_of(error, value))
        raise
    refuse([_secret(place) for place in places_of_secrets(value)][:MOST_ITEMS])
    return read


def _secret(place: tuple[str | int, ...]) -> ProblemItem:
    message = "this looks like a secret; it would be kept and shown to all who may read the job"
    return ProblemItem(pointer=pointer(place), code="secret_refused", message=message)


async def _json(request: Request) -> bytes:
    if not JSON_IN_UTF8.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMedia("unsupported_media_type", "send the body as application/json, in UTF-8")
    return await request.body()


RecoveryBody = Annotated[CreateRecovery, Depends(body_of(CreateRecovery))]
ChangeBody = Annotated[ChangeRecovery, Depends(body_of(ChangeRecovery))]
DiagnosisBody = Annotated[CreateDiagnosis, Depends(body_of(CreateDiagnosis))]


def documented(model: type[BaseModel], example: Any) -> dict[str, Any]:
    """The body's part of the OpenAPI document; `document.py` adds the schema."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}Input"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
