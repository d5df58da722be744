"""Which state of a job may follow which: one table, and nothing else.

    queued ──> running ──> succeeded
      │  <──────┘ │ └────> failed
      │           v          ^
      │       cancelling ────┤
      └─────────> │ ──────> cancelled

`running -> queued` is a release: a worker that shuts down, an application failure that is
tried again, a lease that ran out. A job that was asked to stop may still reach another end
first. Terminal states are final.
"""

from collections.abc import Mapping

from recoup.schemas import State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.errors import Conflict

NEXT: Mapping[State, frozenset[State]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"queued", "cancelling", "succeeded", "failed"}),
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "cancelled": frozenset(),
    "succeeded": frozenset(),
    "failed": frozenset(),
}

HELD_STATES: frozenset[State] = frozenset({"running", "cancelling"})
"""A worker holds the job."""


def check(old: State, new: State) -> None:
    """Refuses an illegal step, with a sentence."""
    if new in NEXT[old]:
        return
    if old in TERMINAL_STATES:
        raise Conflict("job_terminal", f"the job has ended as {old}; it cannot become {new}")
    raise Conflict("illegal_transition", f"a job that is {old} cannot become {new}")
