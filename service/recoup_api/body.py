"""Reads the body that creates a job: JSON in UTF-8, of bounded size, exactly as the contract says.

FastAPI's own way would hand pydantic a value that `json` has read, NaN and coercions
included; here pydantic reads the bytes. Their number is bounded by `limit.py`.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import ValidationError
from pydantic_core import from_json

from recoup.schemas import CreateDiagnosis, CreateRecovery
from recoup.schemas.request import Input
from recoup_jobs.errors import BadRequest, Unprocessable, UnsupportedMedia
from recoup_jobs.findings import items_of

JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)


Body = TypeVar("Body", bound=Input)


def reader(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """What reads a body of this model, as a dependency."""

    async def read(request: Request) -> Body:
        _require_json(request.headers.get("content-type", ""))
        return parse(await request.body(), model)

    return read


def parse(raw: bytes, model: type[Body]) -> Body:
    """Raises `BadRequest` for what is no JSON, `Unprocessable` for what is not in the contract."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise BadRequest("malformed_json", first["msg"]) from None
        items = items_of(error, from_json(raw))
        raise Unprocessable(items[0].code, f"{items[0].pointer}: {items[0].message}", items) from None


def _require_json(content_type: str) -> None:
    if not JSON_IN_UTF8.fullmatch(content_type):
        raise UnsupportedMedia("unsupported_media_type", "send the body as application/json, in UTF-8")


RecoveryBody = Annotated[CreateRecovery, Depends(reader(CreateRecovery))]
DiagnosisBody = Annotated[CreateDiagnosis, Depends(reader(CreateDiagnosis))]


def documented(model: type[Input], path: str) -> dict[str, Any]:
    """The part of the OpenAPI document that describes the body of `POST <path>`."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema/$defs/"
    schema = model.model_json_schema(ref_template=place + "{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
