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
from recoup.schemas import (
    Alignment,
    Artifact,
    Capabilities,
    CreateDiagnosis,
    CreateRecovery,
    Diagnosis,
    Event,
    File,
    Recovery,
    Report,
)

if TYPE_CHECKING:
    from recoup.client import Client

__version__ = "0.1.0"

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Alignment",
    "Artifact",
    "AuthenticationError",
    "BadRequestError",
    "Capabilities",
    "ChecksumError",
    "Client",
    "ConflictError",
    "CreateDiagnosis",
    "CreateRecovery",
    "Diagnosis",
    "Event",
    "File",
    "InternalServerError",
    "InvalidAnswerError",
    "InvalidArgumentError",
    "JobFailedError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RecoupError",
    "Recovery",
    "Report",
    "UnprocessableEntityError",
    "UnsafePathError",
    "WaitTimeoutError",
]


def __getattr__(name: str) -> Any:
    """`Client` is loaded at its first use: the service imports this package for its schemas alone."""
    if name == "Client":
        from recoup.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
