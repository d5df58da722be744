"""What the service answers about jobs: recoveries, events, files, artifacts, problems."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from recoup.schemas.request import CreateRecovery

State = Literal["queued", "running", "paused", "cancelling", "cancelled", "succeeded", "failed"]
Stage = Literal["preflight", "compose", "diagnose", "generate", "distil", "evaluate", "package"]
Outcome = Literal[
    "recovered",
    "partial",
    "no_gain",
    "regressed",
    "not_needed",
    "taught",
    "taught_with_forgetting",
    "not_taught",
]
"""What came of a job; the last three are those of a job that teaches."""
HANDED_OVER: frozenset[Outcome] = frozenset({"recovered", "partial", "taught", "taught_with_forgetting"})
"""Outcomes whose weights are handed over."""
TERMINAL_STATES: frozenset[State] = frozenset({"cancelled", "succeeded", "failed"})


class Output(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)  # built at its first use


class Progress(Output):
    """How far the running stage is."""

    stage: Stage
    done: int
    total: int
    unit: str
    """What is counted: `sequences`, `answers`, `steps`, `files`."""
    eta_seconds: float | None
    """Seconds to the end of this stage at the pace so far."""


class JobError(Output):
    """Why a job failed. A failed job is a different thing from a failed request."""

    code: str
    message: str


class Recovery(Output):
    """One recovery job."""

    id: str
    object: Literal["recovery"]
    state: State
    stage: Stage | None
    """The stage that runs now, or where the job ended."""
    outcome: Outcome | None
    """What came of it, once it succeeded."""
    error: JobError | None
    progress: Progress | None
    request: CreateRecovery
    pausing: bool
    """It was asked to pause, and its worker has not yet let go of it."""
    retry_of: str | None
    """The recovery that this one repeats, whose committed stages it takes over."""
    epoch: int
    """How often a worker took this job up."""
    failures: int
    """How often it ended in an error of its own."""
    losses: int
    """How often its worker or runner vanished, which is no fault of its own."""
    version: int
    """Grows with every change; the ETag."""
    created_at: float
    """Unix seconds, as all times."""
    started_at: float | None
    finished_at: float | None


class Event(Output):
    """One line of a job's history; `seq` counts from 1 without gaps."""

    object: Literal["recovery.event"]
    seq: int
    epoch: int
    type: Literal["state", "stage", "metric", "log"]
    data: dict[str, Any]
    at: float


class Artifact(Output):
    """A file that a recovery produced."""

    object: Literal["artifact"]
    path: str
    size: int
    """Bytes."""
    sha256: str


class File(Output):
    """An uploaded data set, in OpenAI's shape."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    """A file that is there was checked."""
    rows: int
    sha256: str


class DeletedFile(Output):
    """The answer to `DELETE /v1/files/{id}`, in OpenAI's shape."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Capabilities(Output):
    """What this installation can do."""

    version: str
    damages: list[str]
    methods: list[str]
    training_modes: list[str]
    models: list[str]
    """Names of the folders below the model roots, as `source` takes them."""


T = TypeVar("T")


class Page(Output, Generic[T]):
    """A page of a list; ask again with `after=next_cursor` while `has_more`."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    next_cursor: str | None


class ProblemItem(Output):
    pointer: str
    """JSON pointer into the body, or `/line/7/messages` into a data set."""
    code: str
    message: str


class Problem(Output):
    """RFC 9457 `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[ProblemItem]
