"""OpenAI's fine-tuning API over the ledger: its request becomes a recovery, a recovery its job.

`model` names the student, or an alias of the settings that names student, teacher and method. Without an
alias the teacher and the method may stand in `metadata` (`teacher`, `method`). Where no teacher is named the
model is healthy: `supervised` teaches it the demonstrations of the training file, and it keeps what it could.
"""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from recoup.schemas import (
    HANDED_OVER,
    BuiltinPrompts,
    ComposedPrompts,
    CreateRecovery,
    Event,
    FilePrompts,
    ProblemItem,
    Recovery,
)
from recoup.schemas.request import FileId, Input, MetadataKey, MetadataValue
from recoup_jobs.errors import Unprocessable
from recoup_jobs.findings import items_of
from recoup_jobs.settings import Alias

STATUSES = {"running": "running", "cancelling": "running", "paused": "queued"}
"""Of states that have another name there; the others are named alike."""
ORIGINS = {
    "/student": "/model",
    "/teacher": "/metadata/teacher",
    "/method": "/metadata/method",
    "/prompts": "/training_file",
    "/teach/file": "/training_file",
    "/teach/held_out": "/validation_file",
    "/teach": "/validation_file",
}
ROWS_A_STEP = 8
"""What an epoch is counted by where the batch size is `auto`."""
USUAL_LEARNING_RATE = 1e-4

Auto = Literal["auto"]
Text = Annotated[str, Field(max_length=500)]


class Hyperparameters(Input):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(Input):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Input):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class CreateJob(Input):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model_config = ConfigDict(json_schema_extra={"title": "CreateJob"})

    model: Annotated[str, Field(min_length=1, max_length=500)]
    training_file: FileId
    validation_file: FileId | None = None
    """Held-out demonstrations that decide; without it, and where a teacher is named, rows of `training_file`
    are held out."""
    hyperparameters: Hyperparameters = Hyperparameters()
    method: Method | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """None are supported."""


def as_recovery(job: CreateJob, aliases: dict[str, Alias], rows: int) -> CreateRecovery:
    """`rows`: of the training file. Raises `Unprocessable` for models and metadata that cannot be."""
    named = dict(job.metadata or {})
    alias = aliases.get(job.model) or Alias(student=job.model, teacher=named.get("teacher"))
    if alias.teacher in {None, alias.student}:
        rows_of: dict[str, Any] = {"teach": {"file": job.training_file, "held_out": job.validation_file}}
    else:
        rows_of = {"prompts": {"file": job.training_file}}
    body: dict[str, Any] = {
        "student": {"source": alias.student},
        "teacher": {"source": alias.teacher or alias.student},
        **rows_of,
        "method": {"type": named.get("method") or alias.method or "auto"},
        "training": _training(job, rows),
        "output": {"name": _plain(job.suffix)},
        "seed": job.seed or 0,
        "metadata": named,
    }
    try:
        return CreateRecovery.model_validate(body)
    except ValidationError as error:
        raise in_words_of_job(items_of(error, body)) from None


def in_words_of_job(items: Sequence[ProblemItem]) -> Unprocessable:
    """Findings about the recovery, at the places of the job that they came from."""
    moved = [_at_origin(item) for item in items]
    return Unprocessable(moved[0].code, f"{moved[0].pointer}: {moved[0].message}", moved)


def as_job(recovery: Recovery, aliases: dict[str, Alias], tenant: str) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`."""
    asked = recovery.request
    pair = asked.student.source, asked.teacher.source
    model = next((name for name, alias in aliases.items() if alias.pair == pair), pair[0])
    batch_size = asked.training.batch_size
    hyperparameters = {"n_epochs": "auto", "batch_size": batch_size, "learning_rate_multiplier": "auto"}
    has_weights = recovery.outcome in HANDED_OVER
    return {
        "object": "fine_tuning.job",
        "id": recovery.id,
        "model": model,
        "status": STATUSES.get(recovery.state, recovery.state),
        "created_at": int(recovery.created_at),
        "finished_at": None if recovery.finished_at is None else int(recovery.finished_at),
        "fine_tuned_model": f"recovery:{recovery.id}" if has_weights else None,
        "training_file": _training_file(asked),
        "validation_file": asked.teach and asked.teach.held_out,
        "result_files": [],
        "error": recovery.error and {**recovery.error.model_dump(), "param": None},
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "organization_id": tenant,
        "seed": asked.seed,
        "trained_tokens": None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": asked.metadata,
    }


def _training_file(asked: CreateRecovery) -> str:
    if asked.teach:
        return asked.teach.file
    match asked.prompts:
        case FilePrompts(file=id):
            return id
        case BuiltinPrompts(builtin=name):
            return f"builtin:{name}"
        case ComposedPrompts():
            return "composed"


def as_job_event(event: Event) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`."""
    is_metric = event.type == "metric"
    return {
        "object": "fine_tuning.job.event",
        "id": f"ftevent-{event.seq}",
        "created_at": int(event.at),
        "level": "error" if event.data.get("error") else "info",
        "message": _sentence(event),
        "type": "metrics" if is_metric else "message",
        "data": event.data,
    }


def as_checkpoint(id: str, event: Event) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.checkpoint`, of a validation; its loss is that of demonstrations that are not
    trained on, or in a recovery the KL to the teacher."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": f"ftckpt-{event.seq}",
        "created_at": int(event.at),
        "fine_tuned_model_checkpoint": f"recovery:{id}:step-{event.data['step']}",
        "fine_tuning_job_id": id,
        "metrics": {
            "step": event.data["step"],
            "valid_loss": event.data.get("skill_loss", event.data["kl"]),
        },
        "step_number": event.data["step"],
    }


def _training(job: CreateJob, rows: int) -> dict[str, Any]:
    hyper = job.method.supervised.hyperparameters if job.method else job.hyperparameters
    rate = hyper.learning_rate_multiplier
    training: dict[str, Any] = {"batch_size": hyper.batch_size}
    if hyper.n_epochs != "auto":
        a_step = ROWS_A_STEP if hyper.batch_size == "auto" else hyper.batch_size
        training["steps"] = math.ceil(hyper.n_epochs * rows / a_step)
    if rate != "auto":
        training["learning_rate"] = min(10.0, USUAL_LEARNING_RATE * rate)
    return training


def _plain(suffix: str | None) -> str | None:
    return suffix and (re.sub(r"[^a-z0-9._-]", "-", suffix.lower()).lstrip("._-") or None)


def _at_origin(item: ProblemItem) -> ProblemItem:
    """Where in the job stood what became this part of the recovery."""
    found = [origin for part, origin in ORIGINS.items() if item.pointer.startswith(part)]
    return item.model_copy(update={"pointer": found[0]}) if found else item


def _sentence(event: Event) -> str:
    told = ", ".join(f"{name} {value}" for name, value in event.data.items() if not isinstance(value, dict))
    return f"{event.type}: {told}"
