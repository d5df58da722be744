"""Which state of a job may follow which, and what may be asked of it when: two tables, and nothing else.

               ┌──────────┐
               v          │
    paused <─> queued ──> running ──> succeeded
      │  ^     │          │ │ └─────> failed
      │  └─────│──────────┘ v            ^
      │        │       cancelling ───────┤
      └────────┴─────────> │ ─────────> cancelled

`running -> queued` is a release: a worker that shuts down, an application failure that is
tried again, a lease that ran out. `running -> paused` is a release to nobody. A job that was
asked to stop may still reach another end first. Terminal states are final: `retry` makes a
new job.
"""

from collections.abc import Mapping
from typing import Literal

from recoup.schemas import State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.errors import Conflict

Verb = Literal["cancel", "pause", "resume", "retry", "prioritise"]

NEXT: Mapping[State, frozenset[State]] = {
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "cancelling", "succeeded", "failed"}),
    "paused": frozenset({"queued", "cancelled"}),
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "cancelled": frozenset(),
    "succeeded": frozenset(),
    "failed": frozenset(),
}

ASKED_IN: Mapping[Verb, frozenset[State]] = {
    "cancel": frozenset({"queued", "running", "paused", "cancelling"}),
    "pause": frozenset({"queued", "running"}),
    "resume": frozenset({"paused"}),
    "retry": frozenset({"failed", "cancelled"}),
    "prioritise": frozenset({"queued", "running", "paused"}),
}
"""In which states a client may ask what."""

HELD_STATES: frozenset[State] = frozenset({"running", "cancelling"})
"""A worker holds the job."""


def check(old: State, new: State) -> None:
    """Refuses an illegal step, with a sentence."""
    if new in NEXT[old]:
        return
    if old in TERMINAL_STATES:
        raise Conflict("job_terminal", f"the job has ended as {old}; it cannot become {new}")
    raise Conflict("illegal_transition", f"a job that is {old} cannot become {new}")


def require(verb: Verb, state: State) -> None:
    """Refuses what cannot be asked of a job in this state."""
    if state in ASKED_IN[verb]:
        return
    legal = " or ".join(sorted(ASKED_IN[verb]))
    code = "job_terminal" if state in TERMINAL_STATES else "illegal_transition"
    raise Conflict(code, f"the recovery is {state}; {verb} is for one that is {legal}")
