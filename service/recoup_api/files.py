"""`/v1/files`: data sets, in the shape of OpenAI's files API; checked line by line while they are stored."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Form, UploadFile
from fastapi.responses import FileResponse

from recoup.schemas import DeletedFile, File, Page
from recoup_api.wiring import After, Limit, TheCaller, TheLedger, TheSettings, needs
from recoup_jobs import catalog
from recoup_jobs.datasets import MOST_BYTES, delete_file, file_path, store_file
from recoup_jobs.durable import CHUNK
from recoup_jobs.quotas import require_room_for_file

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(needs("files"))])

LARGEST_UPLOAD = MOST_BYTES + (64 << 10)
"""A data set and the form around it."""

Purpose = Annotated[str, Form(pattern=r"^[a-z0-9_-]{1,64}$")]


Sha256 = Annotated[str | None, Form(pattern=r"^[0-9a-f]{64}$")]
"""Of the bytes as they are sent."""


@router.post("")
def upload(
    file: UploadFile,
    purpose: Purpose,
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    sha256: Sha256 = None,
) -> File:
    require_room_for_file(ledger, caller.tenant, settings.max_stored_bytes)
    name = _plain_name(file.filename or "")
    return store_file(ledger, settings, name, purpose, _chunks(file), sha256, caller.tenant)


@router.get("")
def find(ledger: TheLedger, caller: TheCaller, after: After = None, limit: Limit = 20) -> Page[File]:
    return catalog.find(ledger, caller.tenant, after, limit)


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


def _chunks(file: UploadFile) -> Iterator[bytes]:
    return iter(lambda: file.file.read(CHUNK), b"")


def _plain_name(filename: str) -> str:
    """For people to recognise it; it never becomes a path."""
    return "".join(filter(str.isprintable, filename))[-255:] or "data.jsonl"
