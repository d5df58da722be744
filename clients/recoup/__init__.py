"""Recoup's SDK: submit a recovery, follow it, fetch its report and its files."""

from typing import TYPE_CHECKING, Any

from recoup.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ChecksumError,
    ConflictError,
    DeploymentFailedError,
    InternalServerError,
    InvalidAnswerError,
    InvalidArgumentError,
    JobFailedError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RecoupError,
    UnprocessableEntityError,
    UnsafePathError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from recoup._flow import RawResponse
    from recoup.client import AsyncClient, Client
    from recoup.schemas import (
        Alignment,
        Artifact,
        Capabilities,
        CreateDiagnosis,
        CreateRecovery,
        Deployment,
        Diagnosis,
        DryRun,
        Event,
        File,
        Recovery,
        Report,
    )

__version__ = "0.1.0"

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Alignment",
    "Artifact",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Capabilities",
    "ChecksumError",
    "Client",
    "ConflictError",
    "CreateDiagnosis",
    "CreateRecovery",
    "Deployment",
    "DeploymentFailedError",
    "Diagnosis",
    "DryRun",
    "Event",
    "File",
    "InternalServerError",
    "InvalidAnswerError",
    "InvalidArgumentError",
    "JobFailedError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RawResponse",
    "RecoupError",
    "Recovery",
    "Report",
    "UnprocessableEntityError",
    "UnsafePathError",
    "WaitTimeoutError",
]


def __getattr__(name: str) -> Any:
    """Clients and schemas are loaded at their first use: who needs one seldom needs all."""
    if name in {"AsyncClient", "Client"}:
        from recoup import client

        return getattr(client, name)
    if name == "RawResponse":
        from recoup._flow import RawResponse

        return RawResponse
    if name in __all__:
        from recoup import schemas

        return getattr(schemas, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
