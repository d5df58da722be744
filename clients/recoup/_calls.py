"""Every endpoint as a value: method, path, query, body, and how to read the answer. No I/O.

These descriptions are the clients' methods: `recoveries.py`, `diagnoses.py`, `deployments.py` and
`files.py` bind them by name, and signature and docstring are those written here. An id is checked against its
grammar before it becomes part of a path, and an artifact's path is escaped segment by
segment: no argument can address another route. Methods that take an id raise
InvalidArgumentError on what is none, NotFoundError on one that the server does not know.
"""

from __future__ import annotations  # no schema is loaded at import

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from recoup import schemas
from recoup.errors import InvalidArgumentError

if TYPE_CHECKING:
    from recoup.schemas import (
        Alignment,
        Artifact,
        Capabilities,
        CreateRecovery,
        Damage,
        Deployment,
        DeploymentState,
        Diagnosis,
        DryRun,
        Event,
        File,
        ModelRef,
        Outcome,
        Page,
        Recovery,
        Report,
        State,
    )

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
J = TypeVar("J", "Recovery", "Diagnosis")


class Upload(NamedTuple):
    """A local file that travels as a form."""

    path: Path
    purpose: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how to read its answer."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    parse: Callable[[bytes], T]
    """From the body of the answer; raises pydantic's ValidationError on a body that is none of ours."""
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = (("Accept", "application/json"),)
    json: Any = None
    upload: Upload | None = None
    hold: float = 0.0
    """Seconds for which the server may rightly stay silent (a long poll, a stream of events)."""

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method != "POST" or self.key is not None

    @property
    def key(self) -> str | None:
        """Its `Idempotency-Key`."""
        return dict(self.headers).get("Idempotency-Key")


@dataclass(frozen=True)
class Jobs(Generic[J]):
    """What can be asked of jobs of one kind, once they are there."""

    name: str
    path: str
    load: Callable[[], type[J]]
    """The model of one."""

    def get(self, id: str) -> Call[J]:
        """The job as it stands; a diagnosis that succeeded has its report with it."""
        return Call("GET", self._at(id), _reader(self.load()))

    def await_change(self, seen: J, wait: int) -> Call[J | None]:
        """The job as soon as it differs from what was seen, or None after `wait` seconds."""
        return _poll(self._at(seen.id), self.load(), seen.version, wait)

    def list(
        self,
        after: str | None = None,
        limit: int | None = None,
        *,
        state: State | None = None,
        outcome: Outcome | None = None,
        damage: Damage | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Call[Page[J]]:
        """All jobs, or those of which all that is given holds, newest first; `limit` is the size of a page.

        `damage` is that of the request; of `metadata` every pair must be there. Pages are fetched as they
        are asked for.
        """
        pairs = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        query = _query(after=after, limit=limit, state=state, outcome=outcome, damage=damage, **pairs)
        return Call("GET", self.path, _page_reader(self.load()), query=query)

    def cancel(self, id: str) -> Call[J]:
        """Ask the job to stop. Raises ConflictError once it has ended."""
        return Call("POST", f"{self._at(id)}/cancel", _reader(self.load()))

    def pause(self, id: str) -> Call[J]:
        """Ask the job to give its device back and to wait. Raises ConflictError where it cannot."""
        return Call("POST", f"{self._at(id)}/pause", _reader(self.load()))

    def resume(self, id: str) -> Call[J]:
        """Let a paused job go on. Raises ConflictError if it is not paused."""
        return Call("POST", f"{self._at(id)}/resume", _reader(self.load()))

    def retry(self, id: str, *, idempotency_key: str | None = None) -> Call[J]:
        """A new job that repeats one which failed or was cancelled, and takes over its committed stages.

        Raises ConflictError where the job's state does not allow it.
        """
        return _keyed(Call("POST", f"{self._at(id)}/retry", _reader(self.load())), idempotency_key)

    def change(
        self, id: str, *, priority: int | None = None, metadata: dict[str, str] | None = None
    ) -> Call[J]:
        """Another priority, other metadata (all pairs); what is None stays as it is."""
        given = {"priority": priority, "metadata": metadata}
        changes = schemas.ChangeRecovery.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
        body = changes.model_dump(mode="json", exclude_unset=True)
        return Call("PATCH", self._at(id), _reader(self.load()), json=body)

    def history(self, id: str, after: int = 0) -> Call[Page[Event]]:
        """The events so far whose `seq` is greater than `after`."""
        return Call("GET", f"{self._at(id)}/events", _page_reader(schemas.Event), query=_query(after=after))

    def stream(self, id: str, after: int = 0) -> Call[bytes]:
        """The events after the one with this `seq`, as server-sent events; every 15 seconds a comment."""
        headers = (("Accept", "text/event-stream"), ("Cache-Control", "no-store"))
        last = (("Last-Event-ID", str(after)),) if after else ()
        return Call("GET", f"{self._at(id)}/events", bytes, headers=headers + last, hold=STREAM_SILENCE)

    def alignment(self, id: str) -> Call[Alignment]:
        """CKA of the student's layers with the teacher's, before and, of a recovery, after."""
        return Call("GET", f"{self._at(id)}/alignment", _reader(schemas.Alignment))

    def _at(self, id: str) -> str:
        return f"{self.path}/{_checked(id, self.name)}"


RECOVERIES = Jobs("recovery", "/v1/recoveries", lambda: schemas.Recovery)
DIAGNOSES = Jobs("diagnosis", "/v1/diagnoses", lambda: schemas.Diagnosis)


def create_recovery(
    request: CreateRecovery | None = None,
    *,
    student: str | dict[str, Any] | ModelRef | None = None,
    teacher: str | dict[str, Any] | ModelRef | None = None,
    idempotency_key: str | None = None,
    **fields: Any,
) -> Call[Recovery]:
    """Submit a recovery, either a ready `request` or its fields; a bare str names a model's source.

    With `teach` the student is healthy: it is its own teacher, and `teacher` may be left out.
    The same `idempotency_key` again, even from another process, is answered with the same job.
    Raises pydantic's ValidationError, or InvalidArgumentError on a key, before anything is sent.
    """
    body = _request_body(request, student, teacher, fields)
    return _keyed(Call("POST", "/v1/recoveries", _reader(schemas.Recovery), json=body), idempotency_key)


def dry_run(
    *,
    student: str | dict[str, Any] | ModelRef | None = None,
    teacher: str | dict[str, Any] | ModelRef | None = None,
    **fields: Any,
) -> Call[DryRun]:
    """What a recovery of these fields would do and cost, and what preflight finds; nothing is queued.

    What it would be refused for are its `findings`; UnprocessableEntityError is raised for fields alone.
    """
    body = _request_body(None, student, teacher, fields)
    return Call("POST", "/v1/recoveries", _reader(schemas.DryRun), query=_query(dry_run="true"), json=body)


def get_report(id: str) -> Call[Report]:
    """What was measured, and the verdict. Raises ConflictError while the job runs."""
    return Call("GET", f"{_recovery(id)}/report", _reader(schemas.Report))


def get_report_html(id: str) -> Call[str]:
    """The report as one self-contained page."""
    return Call("GET", f"{_recovery(id)}/report", _text, headers=(("Accept", "text/html"),))


def get_recipe(id: str) -> Call[str]:
    """A Python script that repeats the training with transformers and peft alone.

    Raises NotFoundError where nothing was trained.
    """
    return Call("GET", f"{_recovery(id)}/recipe", _text, headers=(("Accept", "text/x-python"),))


def list_artifacts(id: str, after: str | None = None) -> Call[Page[Artifact]]:
    """The manifest: path, size and SHA-256 of each file that the job produced."""
    return Call(
        "GET", f"{_recovery(id)}/artifacts", _page_reader(schemas.Artifact), query=_query(after=after)
    )


def get_artifact(id: str, path: str, start: int = 0) -> Call[bytes]:
    """The content of one artifact from byte `start` on, as it is stored."""
    escaped = "/".join(quote(segment, safe="") for segment in path.split("/"))
    headers = (("Accept", "*/*"), ("Accept-Encoding", "identity"))
    rest = (("Range", f"bytes={start}-"),) if start else ()
    return Call("GET", f"{_recovery(id)}/artifacts/{escaped}", bytes, headers=headers + rest)


def create_diagnosis(
    *,
    student: str | dict[str, Any] | ModelRef,
    teacher: str | dict[str, Any] | ModelRef,
    idempotency_key: str | None = None,
    **fields: Any,
) -> Call[Diagnosis]:
    """Submit a diagnosis by the fields of `CreateDiagnosis`; a bare str names a model's source.

    The same `idempotency_key` again, even from another process, is answered with the same job.
    Raises pydantic's ValidationError, or InvalidArgumentError on a key, before anything is sent.
    """
    models = {"student": _model(student), "teacher": _model(teacher)}
    request = schemas.CreateDiagnosis.model_validate(models | fields)
    body = request.model_dump(mode="json", exclude_unset=True)
    return _keyed(Call("POST", "/v1/diagnoses", _reader(schemas.Diagnosis), json=body), idempotency_key)


def create_file(
    path: str | PathLike[str], purpose: str = "recovery", *, idempotency_key: str | None = None
) -> Call[File]:
    """Upload a JSONL file; the server checks it line by line.

    The same `idempotency_key` with the same content again is answered with the same file.

    Raises UnprocessableEntityError naming the lines that cannot be used, OSError if
    the file cannot be read.
    """
    call = Call("POST", "/v1/files", _reader(schemas.File), upload=Upload(Path(path), purpose))
    return _keyed(call, idempotency_key)


def list_files(after: str | None = None, limit: int | None = None) -> Call[Page[File]]:
    """All files, newest first, fetched page by page as they are asked for; `limit` is the size of a page."""
    return Call("GET", "/v1/files", _page_reader(schemas.File), query=_query(after=after, limit=limit))


def get_file(id: str) -> Call[File]:
    """One file's description."""
    return Call("GET", _file(id), _reader(schemas.File))


def get_file_content(id: str) -> Call[bytes]:
    """The file's bytes, as they were uploaded."""
    return Call("GET", f"{_file(id)}/content", bytes, headers=(("Accept", "*/*"),))


def delete_file(id: str) -> Call[None]:
    """Remove a file. Raises ConflictError while a recovery that has not ended names it."""
    return Call("DELETE", _file(id), _nothing)


def create_deployment(
    recovery: str, *, name: str | None = None, idempotency_key: str | None = None
) -> Call[Deployment]:
    """Serve what a recovery handed over, under `name` (default: its `output.name`, else its id).

    The answer is pending; `wait` until it is live. A name that is served already passes over then.
    Raises pydantic's ValidationError before anything is sent, UnprocessableEntityError for what cannot be
    served, ConflictError where the installation has no servers to deploy to.
    """
    given = {"recovery": recovery} | ({} if name is None else {"name": name})
    body = schemas.CreateDeployment.model_validate(given).model_dump(mode="json", exclude_unset=True)
    return _keyed(Call("POST", "/v1/deployments", _reader(schemas.Deployment), json=body), idempotency_key)


def get_deployment(id: str) -> Call[Deployment]:
    """The deployment as it stands, server by server."""
    return Call("GET", _deployment(id), _reader(schemas.Deployment))


def list_deployments(
    after: str | None = None, limit: int | None = None, *, state: DeploymentState | None = None
) -> Call[Page[Deployment]]:
    """All deployments, or those in this state, newest first; `limit` is the size of a page."""
    query = _query(after=after, limit=limit, state=state)
    return Call("GET", "/v1/deployments", _page_reader(schemas.Deployment), query=query)


def delete_deployment(id: str) -> Call[Deployment]:
    """Take it out of service; it stays known as withdrawn."""
    return Call("DELETE", _deployment(id), _reader(schemas.Deployment))


def roll_back_deployment(id: str) -> Call[Deployment]:
    """Serve again what had the name before this one, which serves until that is live; returns the former.

    Raises ConflictError where there is none, or this one is not live.
    """
    return Call("POST", f"{_deployment(id)}/rollback", _reader(schemas.Deployment))


def chat(model: str, messages: list[dict[str, str]], *, max_tokens: int = 512) -> Call[str]:
    """What a deployment of this name answers, greedily; for all settings and streams use the openai package.

    Raises NotFoundError where no deployment of the name is live.
    """
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return Call("POST", "/v1/chat/completions", _said, json=body, hold=ANSWER_SILENCE)


def get_capabilities() -> Call[Capabilities]:
    """What this installation can do."""
    return Call("GET", "/v1/capabilities", _reader(schemas.Capabilities))


def get_readiness() -> Call[None]:
    """Nothing, where the server is ready to work. Raises InternalServerError (503) where it is not."""
    return Call("GET", "/readyz", _nothing)


def next_page(call: Call[Page[T]], page: Page[T]) -> Call[Page[T]] | None:
    """The call for what follows a page, or None after the last one."""
    if not page.has_more or page.next_cursor is None:
        return None
    kept = tuple(pair for pair in call.query if pair[0] != "after")
    return replace(call, query=(*kept, ("after", page.next_cursor)))


ANSWER_SILENCE = 300.0
"""Seconds for which a model may think before it answers."""
STREAM_SILENCE = 30.0
"""Seconds for which a stream may be silent, beyond a client's timeout."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def _request_body(
    request: CreateRecovery | None,
    student: str | dict[str, Any] | ModelRef | None,
    teacher: str | dict[str, Any] | ModelRef | None,
    fields: dict[str, Any],
) -> Any:
    """Only what the caller set is sent: defaults stay the server's."""
    if request is None:
        own = student if teacher is None and fields.get("teach") else teacher
        models = {"student": _model(student), "teacher": _model(own)}
        request = schemas.CreateRecovery.model_validate(models | fields)
    elif fields or student is not None or teacher is not None:
        raise TypeError("create() takes a request or its fields, not both.")
    return request.model_dump(mode="json", exclude_unset=True)


def _model(model: str | dict[str, Any] | ModelRef | None) -> Any:
    return {"source": model} if isinstance(model, str) else model


def _keyed(call: Call[T], idempotency_key: str | None) -> Call[T]:
    if idempotency_key is None:
        return call
    if not _KEY.fullmatch(idempotency_key):
        raise InvalidArgumentError("An idempotency key has 1 to 255 printable ASCII characters, no space.")
    return replace(call, headers=(*call.headers, ("Idempotency-Key", idempotency_key)))


def _recovery(id: str) -> str:
    return f"/v1/recoveries/{_checked(id, 'recovery')}"


def _deployment(id: str) -> str:
    return f"/v1/deployments/{_checked(id, 'deployment')}"


def _file(id: str) -> str:
    return f"/v1/files/{_checked(id, 'file')}"


def _checked(id: str, kind: str) -> str:
    if not _ID.fullmatch(id):
        raise InvalidArgumentError(f"{id!r} is no id of a {kind}: expected letters, digits, '-' and '_'.")
    return id


def _query(**values: str | int | None) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items() if value is not None)


def _poll(path: str, model: type[M], version: int, wait: int) -> Call[M | None]:
    """Held by the server until the job has another version, at most for `wait` seconds."""
    condition = ("If-None-Match", f'"{version}"')
    return Call(
        "GET",
        path,
        partial(_read_unless_empty, model),
        query=_query(wait=wait),
        headers=(("Accept", "application/json"), condition),
        hold=float(wait),
    )


def _reader(model: type[M]) -> Callable[[bytes], M]:
    return partial(_read, model)


def _read(model: type[M], body: bytes) -> M:
    return model.model_validate_json(body)


def _page_reader(item: type[M]) -> Callable[[bytes], Page[M]]:
    return partial(_read_page, item)


def _read_page(item: type[M], body: bytes) -> Page[M]:
    """The page's model is made here, at its first use."""
    return schemas.Page[item].model_validate_json(body)  # type: ignore[valid-type]


def _read_unless_empty(model: type[M], body: bytes) -> M | None:
    return model.model_validate_json(body) if body else None


class _Answer(BaseModel):
    """As much of OpenAI's answer as is read."""

    model_config = ConfigDict(defer_build=True)

    choices: list[_Choice]


class _Choice(BaseModel):
    model_config = ConfigDict(defer_build=True)

    message: dict[str, Any]


def _said(body: bytes) -> str:
    answer = _Answer.model_validate_json(body)
    return str(answer.choices[0].message.get("content") or "") if answer.choices else ""


def _text(body: bytes) -> str:
    return body.decode("utf-8", errors="replace")


def _nothing(body: bytes) -> None:
    del body
