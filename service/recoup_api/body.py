"""Reads the bodies of `/v1/recoveries`: JSON in UTF-8, of bounded size, exactly as the contract says.

FastAPI's own way would hand pydantic a value that `json` has read, NaN and coercions
included; here pydantic reads the bytes. Their number is bounded by `limit.py`.
"""

import re
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from recoup.schemas import ChangeRecovery, CreateRecovery
from recoup_jobs.errors import BadRequest, Unprocessable, UnsupportedMedia
from recoup_jobs.findings import items_of

M = TypeVar("M", bound=BaseModel)

JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)


async def _read(request: Request) -> CreateRecovery:
    return parse(await _json(request), CreateRecovery)


async def _read_change(request: Request) -> ChangeRecovery:
    return parse(await _json(request), ChangeRecovery)


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


RecoveryBody = Annotated[CreateRecovery, Depends(_read)]
ChangeBody = Annotated[ChangeRecovery, Depends(_read_change)]

_SCHEMA_AT = "#/paths/~1v1~1recoveries/post/requestBody/content/application~1json/schema/$defs/{model}"


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """The body's part of the OpenAPI document."""
    schema = model.model_json_schema(ref_template=_SCHEMA_AT)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
