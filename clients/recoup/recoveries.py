"""`client.recoveries`: submit a recovery, follow it, fetch what came of it."""

import builtins
import math
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from recoup import _calls, _download
from recoup._follow import Follower
from recoup._sender import Sender, pages
from recoup.errors import JobFailedError, WaitTimeoutError
from recoup.schemas import (
    Alignment,
    Artifact,
    ChangeRecovery,
    CreateRecovery,
    Event,
    ModelRef,
    Progress,
    Recovery,
    Report,
)
from recoup.schemas.recovery import TERMINAL_STATES


class Recoveries:
    """The recoveries of this server. Methods that take an id raise NotFoundError on an unknown one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._follower = Follower(sender)

    def create(
        self,
        request: CreateRecovery | None = None,
        *,
        student: str | dict[str, Any] | ModelRef | None = None,
        teacher: str | dict[str, Any] | ModelRef | None = None,
        **fields: Any,
    ) -> Recovery:
        """Submit a recovery, either a ready `request` or its fields; a bare str names a model's source.

        Raises pydantic's ValidationError before anything is sent.
        """
        if request is None:
            models = {"student": _model(student), "teacher": _model(teacher)}
            request = CreateRecovery.model_validate(models | fields)
        elif fields or student is not None or teacher is not None:
            raise TypeError("create() takes a request or its fields, not both.")
        return self._sender.send(_calls.create_recovery(request))

    def get(self, id: str) -> Recovery:
        """The job as it stands."""
        return self._sender.send(_calls.get_recovery(id))

    def list(self, after: str | None = None, limit: int | None = None) -> Iterator[Recovery]:
        """All jobs, fetched page by page as they are asked for; `limit` is the size of a page."""
        return pages(lambda cursor: self._sender.send(_calls.list_recoveries(cursor, limit)), after)

    def cancel(self, id: str) -> Recovery:
        """Ask the job to stop. Raises ConflictError once it has ended."""
        return self._sender.send(_calls.cancel_recovery(id))

    def pause(self, id: str) -> Recovery:
        """Ask the job to give its device back and to wait. Raises ConflictError where it cannot."""
        return self._sender.send(_calls.pause_recovery(id))

    def resume(self, id: str) -> Recovery:
        """Let a paused job go on. Raises ConflictError if it is not paused."""
        return self._sender.send(_calls.resume_recovery(id))

    def retry(self, id: str) -> Recovery:
        """A new job that repeats one which failed or was cancelled, without what that one had finished."""
        return self._sender.send(_calls.retry_recovery(id))

    def change(
        self, id: str, *, priority: int | None = None, metadata: dict[str, str] | None = None
    ) -> Recovery:
        """Another priority, other metadata (all pairs); what is None stays as it is."""
        given = {"priority": priority, "metadata": metadata}
        changes = {name: value for name, value in given.items() if value is not None}
        return self._sender.send(_calls.change_recovery(id, ChangeRecovery.model_validate(changes)))

    def events(self, id: str, after: int = 0) -> Iterator[Event]:
        """The events so far whose `seq` is greater than `after`."""
        return pages(lambda cursor: self._sender.send(_calls.list_events(id, cursor)), str(after))

    def follow(self, id: str, after: int = 0) -> Iterator[Event]:
        """The events so far, then each new one, until the job has ended. Outlives a restart of the server."""
        for _ in self._follower.states(id, remaining=lambda: math.inf):
            for event in self._follower.events(id, after):
                after = event.seq
                yield event

    def wait(
        self,
        id: str,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Recovery:
        """The job once it has ended `succeeded` or `cancelled`. Outlives a restart of the server.

        Raises JobFailedError if it ended `failed`, WaitTimeoutError after `timeout` seconds
        (the job goes on). The callbacks get the progress at each change and each event once.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        seen, progress = 0, None
        for recovery in self._follower.states(id, remaining=lambda: deadline - time.monotonic()):
            if on_progress and recovery.progress and recovery.progress != progress:
                progress = recovery.progress
                on_progress(progress)
            if on_event:
                seen = self._relay(id, seen, on_event)
            if time.monotonic() >= deadline and recovery.state not in TERMINAL_STATES:
                raise WaitTimeoutError(recovery)
        if recovery.state == "failed":
            raise JobFailedError(recovery)
        return recovery

    def _relay(self, id: str, seen: int, on_event: Callable[[Event], None]) -> int:
        """Tell of each event after `seen`; the `seq` of the last one."""
        for event in self._follower.events(id, seen):
            on_event(event)
            seen = event.seq
        return seen

    def report(self, id: str) -> Report:
        """What was measured, and the verdict. Raises NotFoundError while there is none."""
        return self._sender.send(_calls.get_report(id))

    def report_html(self, id: str) -> str:
        """The report as one self-contained page."""
        return self._sender.send(_calls.get_report_html(id))

    def alignment(self, id: str) -> Alignment:
        """CKA of the student's layers with the teacher's, before and after."""
        return self._sender.send(_calls.get_alignment(id))

    def recipe(self, id: str) -> str:
        """A Python script that repeats the training with transformers and peft alone.

        Raises NotFoundError where nothing was trained.
        """
        return self._sender.send(_calls.get_recipe(id))

    def artifacts(self, id: str) -> builtins.list[Artifact]:
        """The manifest: path, size and SHA-256 of each file that the job produced."""
        return [*pages(lambda cursor: self._sender.send(_calls.list_artifacts(id, cursor)), None)]

    def download(self, id: str, folder: str | PathLike[str]) -> builtins.list[Path]:
        """Fetch all artifacts into the folder and verify each; files that are already right stay.

        Raises UnsafePathError before anything is written, ChecksumError on a file that did
        not arrive as its manifest says.
        """
        artifacts = self.artifacts(id)
        targets = [_download.place(Path(folder), artifact) for artifact in artifacts]
        for artifact, target in zip(artifacts, targets, strict=True):
            self._fetch(id, artifact, target)
        return targets

    def _fetch(self, id: str, artifact: Artifact, target: Path) -> None:
        if _download.is_complete(target, artifact):
            return
        call = _calls.get_artifact(id, artifact.path)
        self._sender.stream(call, lambda chunks: _download.save(chunks, target, artifact))


def _model(model: str | dict[str, Any] | ModelRef | None) -> Any:
    return {"source": model} if isinstance(model, str) else model
