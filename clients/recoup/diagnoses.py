"""`client.diagnoses`: how a student is damaged, without anything done about it."""

import math
import time
from collections.abc import Callable
from typing import Any

from recoup import _calls
from recoup._sender import Sender
from recoup.errors import JobFailedError, WaitTimeoutError
from recoup.schemas import CreateDiagnosis, Diagnosis, ModelRef, Progress
from recoup.schemas.recovery import TERMINAL_STATES

LONG_POLL = 20.0
"""Seconds for which one poll is held."""


class Diagnoses:
    """The diagnoses of this server. Methods that take an id raise NotFoundError on an unknown one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def create(
        self,
        *,
        student: str | dict[str, Any] | ModelRef,
        teacher: str | dict[str, Any] | ModelRef,
        **fields: Any,
    ) -> Diagnosis:
        """Submit a diagnosis by the fields of `CreateDiagnosis`; a bare str names a model's source.

        Raises pydantic's ValidationError before anything is sent.
        """
        models = {
            name: {"source": model} if isinstance(model, str) else model
            for name, model in (("student", student), ("teacher", teacher))
        }
        return self._sender.send(_calls.create_diagnosis(CreateDiagnosis.model_validate(models | fields)))

    def get(self, id: str) -> Diagnosis:
        """The job as it stands, with its report once it succeeded."""
        return self._sender.send(_calls.get_diagnosis(id))

    def cancel(self, id: str) -> Diagnosis:
        """Ask the job to stop. Raises ConflictError once it has ended."""
        return self._sender.send(_calls.cancel_diagnosis(id))

    def wait(
        self,
        id: str,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Diagnosis:
        """The job once it has ended `succeeded` or `cancelled`.

        Raises JobFailedError if it ended `failed`, WaitTimeoutError after `timeout` seconds
        (the job goes on).
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        found = self.get(id)
        while found.state not in TERMINAL_STATES:
            if (left := deadline - time.monotonic()) <= 0:
                raise WaitTimeoutError(found)
            poll = _calls.await_diagnosis(found, int(min(LONG_POLL, left)))
            found = self._sender.send(poll) or found
            if on_progress and found.progress:
                on_progress(found.progress)
        if found.state == "failed":
            raise JobFailedError(found)
        return found
