"""Every endpoint as a value: method, path, query, body, and how to read the answer. No I/O.

A client only sends these, so that a synchronous and an asynchronous one cannot drift
apart. An id is checked against its grammar before it becomes part of a path, and an
artifact's path is escaped segment by segment: no argument can address another route.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from recoup.errors import InvalidArgumentError
from recoup.schemas import (
    Alignment,
    Artifact,
    Capabilities,
    CreateDiagnosis,
    CreateRecovery,
    Diagnosis,
    Event,
    File,
    Page,
    Recovery,
    Report,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A local file that travels as a form."""

    path: Path
    purpose: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how to read its answer."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    parse: Callable[[bytes], T]
    """From the body of the answer; raises pydantic's ValidationError on a body that is none of ours."""
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = (("Accept", "application/json"),)
    json: Any = None
    upload: Upload | None = None
    hold: float = 0.0
    """Seconds for which the server may rightly stay silent (a long poll)."""


def create_recovery(request: CreateRecovery) -> Call[Recovery]:
    """Only what the caller set is sent: defaults stay the server's."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return Call("POST", "/v1/recoveries", _reader(Recovery), json=body)


def get_recovery(id: str) -> Call[Recovery]:
    return Call("GET", _recovery(id), _reader(Recovery))


def await_change(seen: Recovery, wait: int) -> Call[Recovery | None]:
    """The recovery as soon as it differs from what was seen, or None after `wait` seconds."""
    condition = ("If-None-Match", f'"{seen.version}"')
    return Call(
        "GET",
        _recovery(seen.id),
        _recovery_unless_empty,
        query=_query(wait=wait),
        headers=(("Accept", "application/json"), condition),
        hold=float(wait),
    )


def list_recoveries(after: str | None, limit: int | None) -> Call[Page[Recovery]]:
    return Call("GET", "/v1/recoveries", _reader(Page[Recovery]), query=_query(after=after, limit=limit))


def cancel_recovery(id: str) -> Call[Recovery]:
    return Call("POST", f"{_recovery(id)}/cancel", _reader(Recovery))


def list_events(id: str, after: str | None) -> Call[Page[Event]]:
    """`after`: the `seq` of an event, which is also the cursor of these pages."""
    return Call("GET", f"{_recovery(id)}/events", _reader(Page[Event]), query=_query(after=after))


def get_report(id: str) -> Call[Report]:
    return Call("GET", f"{_recovery(id)}/report", _reader(Report))


def get_report_html(id: str) -> Call[str]:
    return Call("GET", f"{_recovery(id)}/report", _text, headers=(("Accept", "text/html"),))


def get_alignment(id: str) -> Call[Alignment]:
    return Call("GET", f"{_recovery(id)}/alignment", _reader(Alignment))


def get_recipe(id: str) -> Call[str]:
    return Call("GET", f"{_recovery(id)}/recipe", _text, headers=(("Accept", "text/x-python"),))


def list_artifacts(id: str, after: str | None) -> Call[Page[Artifact]]:
    return Call("GET", f"{_recovery(id)}/artifacts", _reader(Page[Artifact]), query=_query(after=after))


def get_artifact(id: str, path: str) -> Call[bytes]:
    """The content of one artifact, to be streamed rather than parsed."""
    escaped = "/".join(quote(segment, safe="") for segment in path.split("/"))
    return Call("GET", f"{_recovery(id)}/artifacts/{escaped}", bytes, headers=(("Accept", "*/*"),))


def create_diagnosis(request: CreateDiagnosis) -> Call[Diagnosis]:
    """Only what the caller set is sent: defaults stay the server's."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return Call("POST", "/v1/diagnoses", _reader(Diagnosis), json=body)


def get_diagnosis(id: str) -> Call[Diagnosis]:
    return Call("GET", _diagnosis(id), _reader(Diagnosis))


def await_diagnosis(seen: Diagnosis, wait: int) -> Call[Diagnosis | None]:
    """The diagnosis as soon as it differs from what was seen, or None after `wait` seconds."""
    condition = ("If-None-Match", f'"{seen.version}"')
    return Call(
        "GET",
        _diagnosis(seen.id),
        _diagnosis_unless_empty,
        query=_query(wait=wait),
        headers=(("Accept", "application/json"), condition),
        hold=float(wait),
    )


def cancel_diagnosis(id: str) -> Call[Diagnosis]:
    return Call("POST", f"{_diagnosis(id)}/cancel", _reader(Diagnosis))


def create_file(path: Path, purpose: str) -> Call[File]:
    return Call("POST", "/v1/files", _reader(File), upload=Upload(path, purpose))


def list_files(after: str | None, limit: int | None) -> Call[Page[File]]:
    return Call("GET", "/v1/files", _reader(Page[File]), query=_query(after=after, limit=limit))


def get_file(id: str) -> Call[File]:
    return Call("GET", _file(id), _reader(File))


def delete_file(id: str) -> Call[None]:
    return Call("DELETE", _file(id), _nothing)


def get_capabilities() -> Call[Capabilities]:
    return Call("GET", "/v1/capabilities", _reader(Capabilities))


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def _recovery(id: str) -> str:
    return f"/v1/recoveries/{_checked(id, 'recovery')}"


def _diagnosis(id: str) -> str:
    return f"/v1/diagnoses/{_checked(id, 'diagnosis')}"


def _file(id: str) -> str:
    return f"/v1/files/{_checked(id, 'file')}"


def _checked(id: str, kind: str) -> str:
    if not _ID.fullmatch(id):
        raise InvalidArgumentError(f"{id!r} is no id of a {kind}: expected letters, digits, '-' and '_'.")
    return id


def _query(**values: str | int | None) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items() if value is not None)


def _reader(model: type[M]) -> Callable[[bytes], M]:
    return partial(_read, model)


def _read(model: type[M], body: bytes) -> M:
    return model.model_validate_json(body)


def _recovery_unless_empty(body: bytes) -> Recovery | None:
    return Recovery.model_validate_json(body) if body else None


def _diagnosis_unless_empty(body: bytes) -> Diagnosis | None:
    return Diagnosis.model_validate_json(body) if body else None


def _text(body: bytes) -> str:
    return body.decode("utf-8", errors="replace")


def _nothing(body: bytes) -> None:
    del body
