"""Everything that this package raises on purpose.

    RecoupError
    ├── InvalidArgumentError            an id, an address or a key that cannot be used; also a ValueError
    ├── APIConnectionError              no answer came
    │   └── APITimeoutError             no answer came in time
    ├── APIStatusError                  the server answered no: .problem .status .code .errors .request_id …
    │   ├── BadRequestError             400
    │   ├── AuthenticationError         401
    │   ├── PermissionDeniedError       403
    │   ├── NotFoundError               404
    │   ├── ConflictError               409
    │   ├── UnprocessableEntityError    422
    │   ├── RateLimitError              429
    │   └── InternalServerError         500 and above
    ├── InvalidAnswerError              the server answered yes, but not in Recoup's words
    ├── JobFailedError                  the request was fine, the job was not: .recovery
    ├── DeploymentFailedError           what was to be served is not: .deployment
    ├── WaitTimeoutError                the job goes on, the caller wanted to wait no longer: .recovery
    ├── ChecksumError                   a downloaded file is not the file that the manifest names
    └── UnsafePathError                 an artifact's path would leave the download folder

A request whose *fields* are wrong never leaves: it raises pydantic's `ValidationError`.
Each error keeps its constructor's arguments in `args`, so that all survive pickling.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from pydantic import ValidationError

from recoup import schemas

if TYPE_CHECKING:
    from recoup.schemas import Deployment, Diagnosis, Problem, ProblemItem, Recovery


class RecoupError(Exception):
    """Any error of this package."""


class InvalidArgumentError(RecoupError, ValueError):
    """An argument that could never be sent."""


class APIConnectionError(RecoupError):
    """No answer came: nothing listens there, or the connection broke."""


class APITimeoutError(APIConnectionError):
    """No answer came within the client's timeout."""


class APIStatusError(RecoupError):
    """The server refused the request; `problem` is its answer in full."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(problem, retry_after)
        self.problem = problem
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again, if it said so."""

    def __str__(self) -> str:
        request = f" [request {self.request_id}]" if self.request_id else ""
        items = "".join(f"\n  {item.pointer or '/'}: {item.message}" for item in self.errors)
        return f"The server answered {self.status} ({self.code}): {self.problem.detail}{request}{items}"

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    @property
    def code(self) -> str:
        """The server's own word for what went wrong; stable, to be compared in programs."""
        return self.problem.code

    @property
    def request_id(self) -> str:
        """What to quote when asking the operator; empty if the answer carried none."""
        return self.problem.request_id

    @property
    def errors(self) -> list[ProblemItem]:
        """One item a field or line that was refused."""
        return self.problem.errors


class BadRequestError(APIStatusError):
    """400: the request could not be read."""


class AuthenticationError(APIStatusError):
    """401: no key, or an unknown one."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this."""


class NotFoundError(APIStatusError):
    """404: there is no such thing, or it is not yours."""


class ConflictError(APIStatusError):
    """409: the job's state does not allow this."""


class UnprocessableEntityError(APIStatusError):
    """422: the body was read, and cannot be accepted; see `errors`."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class InternalServerError(APIStatusError):
    """500 and above: the server's fault, or that of something before it."""


class InvalidAnswerError(RecoupError):
    """An answer that this version of the client cannot read."""


class JobFailedError(RecoupError):
    """A job ended `failed`."""

    def __init__(self, recovery: Recovery | Diagnosis) -> None:
        super().__init__(recovery)
        self.recovery = recovery

    def __str__(self) -> str:
        error = self.recovery.error
        why = f"{error.message} ({error.code})" if error else "the server gave no reason"
        stage = self.recovery.stage or "queue"
        return f"{_named(self.recovery)} failed in stage {stage}: {why}"


class DeploymentFailedError(RecoupError):
    """A deployment failed, or was withdrawn before it was live."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self.deployment = deployment

    def __str__(self) -> str:
        reason = self.deployment.reason
        why = f"{reason.message} ({reason.code})" if reason else "somebody took it out of service"
        return f"{_named(self.deployment)} is {self.deployment.state}: {why}"


class WaitTimeoutError(RecoupError):
    """The caller's patience ended before the job did, or before a deployment was live."""

    def __init__(self, recovery: Recovery | Diagnosis | Deployment) -> None:
        super().__init__(recovery)
        self.recovery = recovery

    def __str__(self) -> str:
        return f"{_named(self.recovery)} is still {self.recovery.state}; it goes on without this wait."


class ChecksumError(RecoupError):
    """A downloaded file differs from its entry in the manifest; the file was not kept."""


class UnsafePathError(RecoupError):
    """An artifact's path points outside the download folder; nothing was written."""


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def status_error(problem: Problem, retry_after: float | None = None) -> APIStatusError:
    """The error of the tree that fits the problem's status."""
    kind = InternalServerError if problem.status >= 500 else _BY_STATUS.get(problem.status, APIStatusError)
    return kind(problem, retry_after)


def problem_of(status: int, body: bytes, request_id: str) -> Problem:
    """The problem that an answer states, or one made of its status if it states none (a proxy's page)."""
    try:
        return schemas.Problem.model_validate_json(body).model_copy(update={"status": status})
    except ValidationError:
        known = status in {known.value for known in HTTPStatus}
        title = HTTPStatus(status).phrase if known else "Unknown status"
        return schemas.Problem(
            type="about:blank",
            title=title,
            status=status,
            detail=f"{title}, from something that does not speak as a Recoup server does.",
            code=f"http_{status}",
            request_id=request_id,
            errors=[],
        )


def _named(job: Recovery | Diagnosis | Deployment) -> str:
    return f"{job.object.capitalize()} {job.id}"
