"""`/v1/files`: data sets, in the shape of OpenAI's files API; checked line by line while they are stored."""

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse
from sqlalchemy import Connection

from recoup.schemas import DeletedFile, File, Page
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.wiring import After, Limit, TheCaller, TheLedger, TheSettings, needs
from recoup_jobs import catalog
from recoup_jobs.answers import Answer
from recoup_jobs.datasets import MOST_BYTES, Upload, delete_file, file_path, store_file
from recoup_jobs.durable import CHUNK
from recoup_jobs.quotas import require_room_for_file
from recoup_jobs.scrubber import scrub

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(needs("files"))])

LARGEST_UPLOAD = MOST_BYTES + (64 << 10)
"""A data set and the form around it."""

PURPOSE = r"^[a-z0-9_-]{1,64}$"
Purpose = Annotated[str, Form(pattern=PURPOSE)]


Sha256 = Annotated[str | None, Form(pattern=r"^[0-9a-f]{64}$")]
"""Of the bytes as they are sent."""


@router.post("", response_model=File)
def upload(
    request: Request,
    file: UploadFile,
    purpose: Purpose,
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    sha256: Sha256 = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    what = Upload(_plain_name(file.filename or ""), purpose, caller.tenant, sha256)

    def make(keep: Keep) -> Answer:
        require_room_for_file(ledger, caller.tenant, settings.max_stored_bytes)
        also = partial(_keep_stored, keep)
        return _stored(store_file(ledger, settings, what, _chunks(file), also))

    return answer_once(request, idempotency_key, lambda: f"{what} {_digest(file)}", make)


@router.get("")
def find(
    ledger: TheLedger,
    caller: TheCaller,
    after: After = None,
    limit: Limit = 20,
    purpose: Annotated[str | None, Query(pattern=PURPOSE)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Page[File]:
    return catalog.find(ledger, caller.tenant, after, limit, purpose, order == "asc")


@router.get("/{id}")
def read(id: str, ledger: TheLedger, caller: TheCaller) -> File:
    return catalog.get(ledger, id, caller.tenant)


@router.delete("/{id}")
def delete(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> DeletedFile:
    delete_file(ledger, settings, id, caller.tenant)
    return DeletedFile(id=id, object="file", deleted=True)


@router.get("/{id}/content", response_class=FileResponse)
def content(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> FileResponse:
    file = catalog.get(ledger, id, caller.tenant)
    return FileResponse(file_path(settings, file.id), media_type="application/jsonl", filename=file.filename)


def _stored(file: File) -> Answer:
    return Answer(200, {}, file.model_dump_json())


def _keep_stored(keep: Keep, conn: Connection, file: File) -> None:
    keep(conn, lambda: _stored(file))


def _digest(file: UploadFile) -> str:
    """A retry comes with another boundary around the same content."""
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    file.file.seek(0)
    return digest.hexdigest()


def _chunks(file: UploadFile) -> Iterator[bytes]:
    return iter(lambda: file.file.read(CHUNK), b"")


def _plain_name(filename: str) -> str:
    """For people to recognise it; it never becomes a path."""
    return scrub("".join(filter(str.isprintable, filename))[-255:]) or "data.jsonl"
