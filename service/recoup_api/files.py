"""`/v1/files`: data sets, in the shape of OpenAI's files API; checked line by line while they are stored."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import FileResponse

from recoup.schemas import DeletedFile, File, Page
from recoup_api.wiring import After, Limit, TheLedger, TheSettings
from recoup_jobs import catalog
from recoup_jobs.datasets import MOST_BYTES, delete_file, file_path, store_file
from recoup_jobs.durable import CHUNK

router = APIRouter(prefix="/v1/files", tags=["files"])

LARGEST_UPLOAD = MOST_BYTES + (64 << 10)
"""A data set and the form around it."""

Purpose = Annotated[str, Form(pattern=r"^[a-z0-9_-]{1,64}$")]


Sha256 = Annotated[str | None, Form(pattern=r"^[0-9a-f]{64}$")]
"""Of the bytes as they are sent."""


@router.post("")
def upload(
    file: UploadFile, purpose: Purpose, ledger: TheLedger, settings: TheSettings, sha256: Sha256 = None
) -> File:
    return store_file(ledger, settings, _plain_name(file.filename or ""), purpose, _chunks(file), sha256)


@router.get("")
def find(ledger: TheLedger, after: After = None, limit: Limit = 20) -> Page[File]:
    return catalog.find(ledger, after, limit)


@router.get("/{id}")
def read(id: str, ledger: TheLedger) -> File:
    return catalog.get(ledger, id)


@router.delete("/{id}")
def delete(id: str, ledger: TheLedger, settings: TheSettings) -> DeletedFile:
    delete_file(ledger, settings, id)
    return DeletedFile(id=id, object="file", deleted=True)


@router.get("/{id}/content", response_class=FileResponse)
def content(id: str, ledger: TheLedger, settings: TheSettings) -> FileResponse:
    file = catalog.get(ledger, id)
    return FileResponse(file_path(settings, file.id), media_type="application/jsonl", filename=file.filename)


def _chunks(file: UploadFile) -> Iterator[bytes]:
    return iter(lambda: file.file.read(CHUNK), b"")


def _plain_name(filename: str) -> str:
    """For people to recognise it; it never becomes a path."""
    return "".join(filter(str.isprintable, filename))[-255:] or "data.jsonl"
