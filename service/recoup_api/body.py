"""Reads JSON bodies: in UTF-8, of bounded size, exactly as the contract says.

FastAPI's own way would hand pydantic a value that `json` has read, NaN and coercions
included; here pydantic reads the bytes. Their number is bounded by `limit.py`.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from recoup.schemas import ChangeRecovery, CreateDiagnosis, CreateRecovery
from recoup_jobs.errors import BadRequest, Unprocessable, UnsupportedMedia
from recoup_jobs.findings import items_of

M = TypeVar("M", bound=BaseModel)

JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)


def reader(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """What reads a body of this model, as a dependency."""

    async def read(request: Request) -> M:
        return parse(await _json(request), model)

    return read


def parse(raw: bytes, model: type[M]) -> M:
    """Raises `BadRequest` for what is no JSON, `Unprocessable` for what is not in the contract."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise BadRequest("malformed_json", first["msg"]) from None
        items = items_of(error, from_json(raw))
        raise Unprocessable(items[0].code, f"{items[0].pointer}: {items[0].message}", items) from None


async def _json(request: Request) -> bytes:
    if not JSON_IN_UTF8.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMedia("unsupported_media_type", "send the body as application/json, in UTF-8")
    return await request.body()


RecoveryBody = Annotated[CreateRecovery, Depends(reader(CreateRecovery))]
ChangeBody = Annotated[ChangeRecovery, Depends(reader(ChangeRecovery))]
DiagnosisBody = Annotated[CreateDiagnosis, Depends(reader(CreateDiagnosis))]


def documented(model: type[BaseModel], path: str) -> dict[str, Any]:
    """The part of the OpenAPI document that describes the body of `POST <path>`."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema/$defs/"
    schema = model.model_json_schema(ref_template=place.replace("{", "{{").replace("}", "}}") + "{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
