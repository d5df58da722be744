"""Deployments: recovered models in service, each under a name that clients pass as `model`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from recoup.schemas.recovery import JobError, Outcome, Output
from recoup.schemas.request import Input, Name

RecoveryId = Annotated[str, StringConstraints(pattern=r"^rec_[0-9a-f]{24}$")]
DeploymentState = Literal["pending", "probing", "live", "superseded", "failed", "withdrawn"]
DeploymentKind = Literal["adapter", "model"]
ReplicaState = Literal["ready", "refused", "away"]


class CreateDeployment(Input):
    """The body of `POST /v1/deployments`."""

    recovery: RecoveryId
    """A recovery that succeeded and handed weights over."""
    name: Name | None = None
    """What clients pass as `model`; null: the recovery's `output.name`, else its id. A name that is served
    already passes to this deployment once it is proven."""


class Lineage(Output):
    """Where a served model comes from."""

    recovery: str
    student: str
    teacher: str
    outcome: Outcome


class ReplicaStanding(Output):
    """How a deployment stands on one server."""

    replica: int
    """Its place in `RECOUP_SERVE_URLS`, from 0."""
    state: ReplicaState
    """`ready`: loaded, and its effect proven; `refused`: it must not serve; `away`: it does not answer."""
    reason: JobError | None
    checked_at: float


class Launch(Output):
    """How a vLLM is started that can serve this."""

    arguments: list[str]
    """Of `vllm serve`, the model first: a student by its source, a deployment's folder as it lies below
    `RECOUP_HOME`."""
    environment: dict[str, str]


class Deployment(Output):
    """A recovered model that is wanted in service."""

    id: str
    object: Literal["deployment"]
    name: str
    kind: DeploymentKind
    """`adapter`: beside the student on a server of it; `model`: whole, on a server of its own."""
    state: DeploymentState
    reason: JobError | None
    """Why it failed, or what it waits for."""
    lineage: Lineage
    replicas: list[ReplicaStanding]
    launch: Launch
    version: int
    """Grows with every change of the state."""
    created_at: float
    live_at: float | None
    """Since when it is, or was last, live."""
    ended_at: float | None


class ServedModel(Output):
    """A deployment as `/v1/models` lists it, in OpenAI's shape."""

    id: str
    """Its name."""
    object: Literal["model"]
    created: int
    owned_by: str
    deployment: str
    lineage: Lineage


class ProbeRow(Output):
    """One token of a held-out answer of the teacher, and how likely it was to the trainer's models."""

    ids: Annotated[list[int], Field(min_length=1)]
    """The prompt, and the answer up to that token."""
    token: int
    base: float
    """log p(token | ids) under the student, nats."""
    recovered: float
    """The same under what the recovery hands over."""


class EffectProbe(Output):
    """`probe.json` of a recovery: what whoever serves its weights must find again."""

    object: Literal["recovery.probe"]
    base_sha256: str
    """Of the student's weights."""
    rows: Annotated[list[ProbeRow], Field(min_length=1, max_length=64)]
