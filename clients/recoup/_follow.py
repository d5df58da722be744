"""Following a job to its end, through restarts of the server.

Two ways, for two questions. *Is it over?* (`wait`) asks by long polls: `GET …?wait=20` with
the version last seen answers as soon as anything changed. *What happens?* (`events`) reads
the stream of server-sent events; each carries its `seq` as id, and a stream that breaks is
opened again with `Last-Event-ID`, so that none is missed and none comes twice.

Between two answers the server may be restarted: a follower outlives an outage of up to
`PATIENCE`. Only the first call, which would show a wrong address, fails soon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError

from recoup import _calls, _retry, schemas
from recoup._calls import Call, Jobs
from recoup._flow import (
    WORLD,
    Callback,
    Emit,
    Flow,
    Read,
    Sleep,
    Tell,
    Unanswered,
    World,
    send,
)
from recoup._sending import opened, reason
from recoup._sse import Decoder, Frame
from recoup.errors import (
    APIConnectionError,
    APIStatusError,
    DeploymentFailedError,
    InvalidAnswerError,
    JobFailedError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from recoup.schemas import Deployment, Diagnosis, Event, Page, Progress, Recovery

T = TypeVar("T")
J = TypeVar("J", "Recovery", "Diagnosis")

PATIENCE = 120.0
"""Seconds without any answer after which a follower gives up."""
LONG_POLL = 20.0
"""Seconds for which one poll is held."""
LOOK = 1.0
"""Seconds between looks at a deployment, which has no long poll."""
PAUSE = 0.1
"""Seconds between polls, so that a job that changes all the time does not fill the line."""


def pages(call: Call[Page[T]]) -> Flow[None]:
    """Emits the items of this page and of all that follow; a page is fetched when it is needed."""
    following: Call[Page[T]] | None = call
    while following is not None:
        page = yield from send(following)
        for item in page.data:
            yield Emit(item)
        following = _calls.next_page(following, page)


def everything(call: Call[Page[T]]) -> Flow[list[T]]:
    """The items of this page and of all that follow, through outages."""
    items: list[T] = []
    following: Call[Page[T]] | None = call
    while following is not None:
        page = yield from _patiently(following)
        items += page.data
        following = _calls.next_page(following, page)
    return items


@dataclass(frozen=True)
class Following(Generic[J]):
    """The two ways, for jobs of one kind."""

    jobs: Jobs[J]

    def wait(
        self,
        id: str,
        timeout: float | None = None,
        on_progress: Callback[Progress] | None = None,
        on_event: Callback[Event] | None = None,
    ) -> Flow[J]:
        """The job once it has ended `succeeded` or `cancelled`. Outlives a restart of the server.

        Raises JobFailedError if it ended `failed`, WaitTimeoutError after `timeout` seconds
        (the job goes on). The callbacks get the progress at each change and each event once.
        """
        return (yield from _ended(self.jobs, id, timeout, on_progress, on_event))

    def events(self, id: str, after: int = 0) -> Flow[None]:
        """The job's events whose `seq` is greater than `after`: those so far, then each as it comes.

        Ends with the job. Outlives a restart of the server; no event is missed, none comes twice.
        """
        outage = Outage()
        while True:
            try:
                head = yield from opened(self.jobs.stream(id, after))
                if not head.headers.get("content-type", "").startswith("text/event-stream"):
                    asked = f"when asked for events of {id}"
                    raise InvalidAnswerError(f"The server answered with no stream {asked}.")
                decoder = Decoder()
                while chunk := (yield Read()):
                    outage.over()
                    for frame in decoder.feed(chunk):
                        if frame.event == "end":
                            return
                        if (event := _new_event(frame, after)) is not None:
                            after = event.seq
                            yield Emit(event)
                raise Unanswered(APIConnectionError("The stream of events broke off."), sent=True)
            except (Unanswered, APIStatusError) as failed:
                yield Sleep(outage.pause(failed))


def wait_for_deployment(
    id: str, timeout: float | None = None, on_change: Callback[Deployment] | None = None
) -> Flow[Deployment]:
    """The deployment once it is live. Outlives a restart of the server.

    `on_change` is called with what is not live yet, whenever its state or its reason is another.
    Raises DeploymentFailedError if it failed or was withdrawn, WaitTimeoutError after `timeout` seconds.
    """
    deadline = math.inf if timeout is None else WORLD.clock() + timeout
    deployment = yield from send(_calls.get_deployment(id))
    told = None
    while deployment.state in {"pending", "probing"}:
        if on_change and (deployment.state, deployment.reason) != told:
            told = deployment.state, deployment.reason
            yield Tell(on_change, deployment)
        if WORLD.clock() >= deadline:
            raise WaitTimeoutError(deployment)
        yield Sleep(LOOK)
        deployment = yield from _patiently(_calls.get_deployment(id))
    if deployment.state in {"failed", "withdrawn"}:
        raise DeploymentFailedError(deployment)
    return deployment


@dataclass
class Outage:
    """How long nothing has come, and how long to wait before the next try."""

    patience: float = 0.0
    """Seconds; none before the first answer, so that a wrong address shows at once."""
    attempts: int = 0
    since: float | None = None
    world: World = WORLD

    def over(self) -> None:
        """Something came."""
        self.patience, self.attempts, self.since = PATIENCE, 0, None

    def pause(self, failed: Unanswered | APIStatusError) -> float:
        """Seconds until the next try. Raises the error if this is no outage, or has lasted too long."""
        error, failure = reason(failed)
        self.since = self.world.clock() if self.since is None else self.since
        self.attempts += 1
        lasted = self.world.clock() - self.since
        patient = lasted < self.patience or self.attempts <= FIRST_TRIES
        if not patient or not _retry.is_worth_another_try(True, failure):
            raise error
        return _retry.delay(self.attempts, self.world.jitter(), failure.retry_after)


FIRST_TRIES = 2
"""Failed tries of a follower that has not been answered yet."""


def _ended(
    jobs: Jobs[J],
    id: str,
    timeout: float | None,
    on_progress: Callback[Progress] | None,
    on_event: Callback[Event] | None,
) -> Flow[J]:
    """The job as it ended: asked for once, then whenever it has changed."""
    deadline = math.inf if timeout is None else WORLD.clock() + timeout
    seen, progress = 0, None
    job = yield from send(jobs.get(id))
    while True:
        if on_progress and job.progress and job.progress != progress:
            progress = job.progress
            yield Tell(on_progress, progress)
        if on_event:
            for event in (yield from everything(jobs.history(id, seen))):
                seen = event.seq
                yield Tell(on_event, event)
        if job.state in schemas.TERMINAL_STATES:
            return _unless_failed(job)
        if WORLD.clock() >= deadline:
            raise WaitTimeoutError(job)
        yield Sleep(PAUSE)
        held = int(max(0.0, min(LONG_POLL, deadline - WORLD.clock())))
        job = (yield from _patiently(jobs.await_change(job, held))) or job


def _patiently(call: Call[T]) -> Flow[T]:
    """The answer, through an outage: whoever called before had an answer."""
    outage = Outage(patience=PATIENCE + call.hold)
    while True:
        try:
            return (yield from send(call))
        except APIConnectionError as error:
            yield Sleep(outage.pause(Unanswered(error, sent=True)))
        except APIStatusError as error:
            yield Sleep(outage.pause(error))


def _new_event(frame: Frame, after: int) -> Event | None:
    """The event of a frame, if it is a part of the job's history and not a repetition."""
    if not frame.id.isdecimal() or int(frame.id) <= after:
        return None
    try:
        return schemas.Event.model_validate_json(frame.data)
    except ValidationError as error:
        raise InvalidAnswerError(f"The server sent an event that this client cannot read: {frame}") from error


def _unless_failed(job: J) -> J:
    if job.state == "failed":
        raise JobFailedError(job)
    return job
