"""Uploaded data sets: checked line by line while they stream to disk, read back as prompts or text.

A file is kept whole or not at all. What a line may hold stands in `rows.py`, the rows of
the ledger's table of files in `catalog.py`.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from recoup.schemas import BuiltinPrompts, ComposedPrompts, File, FilePrompts, Prompt, TextRow
from recoup_jobs import catalog
from recoup_jobs.catalog import Also, NewFile
from recoup_jobs.durable import CHUNK, sync_folder
from recoup_jobs.errors import BadRequest, TooLarge, Unprocessable
from recoup_jobs.gzipped import unpacked
from recoup_jobs.ledger import Ledger
from recoup_jobs.rows import Row, RowKind, check, lines, read_row
from recoup_jobs.settings import Settings
from recoup_jobs.tables import DEFAULT_TENANT

MOST_BYTES = 512 << 20
PromptSource = FilePrompts | BuiltinPrompts | ComposedPrompts
BUILTIN = Path(__file__).with_name("builtin")


@dataclass(frozen=True)
class Upload:
    """What comes with the bytes of a data set."""

    filename: str
    purpose: str
    tenant: str = DEFAULT_TENANT
    sha256: str | None = None
    """What the sender says of the bytes as they are sent."""


def store_file(
    ledger: Ledger,
    settings: Settings,
    upload: Upload,
    chunks: Iterable[bytes],
    also: Also = lambda *_: None,
) -> File:
    """Keeps a JSONL data set, plain or gzipped; what `also` writes is there with it, or neither is.

    Raises `Unprocessable`, `TooLarge` or `BadRequest`, and keeps nothing, if it is no good.
    """
    id = f"file-{secrets.token_hex(12)}"
    settings.files_dir.mkdir(parents=True, exist_ok=True)
    aside, place = settings.files_dir / f".{id}.part", file_path(settings, id)
    try:
        checked = _write_checked(aside, unpacked(_as_declared(chunks, upload.sha256)))
        aside.replace(place)
        sync_folder(settings.files_dir)
        new = NewFile(
            id=id, filename=upload.filename, purpose=upload.purpose, tenant=upload.tenant, **checked
        )
        return catalog.add(ledger, new, also)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    finally:
        aside.unlink(missing_ok=True)


def delete_file(ledger: Ledger, settings: Settings, id: str, tenant: str) -> None:
    catalog.remove(ledger, id, tenant)
    file_path(settings, id).unlink(missing_ok=True)


def file_path(settings: Settings, id: str) -> Path:
    return settings.files_dir / f"{id}.jsonl"


def load_prompts(ledger: Ledger, settings: Settings, source: PromptSource) -> list[Prompt]:
    return list(iter_prompts(ledger, settings, source))


def iter_prompts(
    ledger: Ledger, settings: Settings, source: PromptSource, tenant: str | None = None
) -> Iterator[Prompt]:
    """One at a time, for who needs only the first few; of this tenant or, for a worker, of anybody.

    Of those that a teacher is to write there are none yet.
    """
    if isinstance(source, ComposedPrompts):
        return
    for row in read_rows(_prompts_path(ledger, settings, source, tenant)):
        if not isinstance(row, TextRow):
            yield row.as_prompt()


def load_text(ledger: Ledger, settings: Settings, source: FilePrompts) -> list[str]:
    path = _path_of_kind(ledger, settings, source.file, "text")
    return [row.text for row in read_rows(path) if isinstance(row, TextRow)]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file; raises `Unprocessable` at the first line that holds none."""
    with path.open("rb") as content:
        for number, line in lines(iter(lambda: content.read(CHUNK), b"")):
            yield read_row(number, line)


def require_kind(ledger: Ledger, id: str, kind: RowKind, tenant: str | None = None) -> None:
    """Raises `NotFound` for an unknown file, `Unprocessable` for one that holds something else."""
    found = catalog.kind(ledger, id, tenant)
    if found != kind:
        raise Unprocessable("wrong_rows", f"the file holds {found}; here it must hold {kind}")


def _as_declared(chunks: Iterable[bytes], sha256: str | None) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if sha256 not in (None, digest.hexdigest()):
        raise BadRequest("checksum_mismatch", "the content's sha256 is not the one that was declared")


def _write_checked(aside: Path, chunks: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with aside.open("xb") as out:
        kind, rows = check(lines(_written(chunks, out, digest)))
        out.flush()
        os.fsync(out.fileno())
        return {"kind": kind, "rows": rows, "bytes": out.tell(), "sha256": digest.hexdigest()}


def _written(chunks: Iterable[bytes], out: BinaryIO, digest: Any) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        out.write(chunk)
        if out.tell() > MOST_BYTES:
            raise TooLarge("file_too_large", f"a data set may have {MOST_BYTES} bytes at most")
        yield chunk


def _prompts_path(
    ledger: Ledger, settings: Settings, source: FilePrompts | BuiltinPrompts, tenant: str | None
) -> Path:
    if isinstance(source, BuiltinPrompts):
        return BUILTIN / f"{source.builtin}.jsonl"
    return _path_of_kind(ledger, settings, source.file, "prompts", tenant)


def _path_of_kind(
    ledger: Ledger, settings: Settings, id: str, kind: RowKind, tenant: str | None = None
) -> Path:
    require_kind(ledger, id, kind, tenant)
    return file_path(settings, id)
