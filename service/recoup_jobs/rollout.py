"""Which state of a deployment may follow which: a table, and nothing else.

    pending <──> probing ──> live ──> superseded
      ^  │          │         │           │
      │  └──────────┴─> failed│           │
      │                   │   │           │
      │                   v   v           v
      │                  withdrawn  <─────┤
      └───────────────────────────────────┘

`pending`: wanted, but no server has it. `probing`: it is loaded, and its effect is measured. `live`: its
name leads to it. `superseded`: another deployment took the name; a rollback makes it `pending` again.
`probing -> pending`: the servers went away in the middle. What failed stays so: deploy again.
"""

from collections.abc import Mapping

from recoup.schemas import DeploymentState
from recoup_jobs.errors import Conflict

NEXT: Mapping[DeploymentState, frozenset[DeploymentState]] = {
    "pending": frozenset({"probing", "failed", "withdrawn"}),
    "probing": frozenset({"pending", "live", "failed", "withdrawn"}),
    "live": frozenset({"superseded", "withdrawn"}),
    "superseded": frozenset({"pending", "withdrawn"}),
    "failed": frozenset({"withdrawn"}),
    "withdrawn": frozenset(),
}

WANTED: tuple[DeploymentState, ...] = ("pending", "probing", "live")
"""A deployment in one of these belongs on the servers."""


def check(old: DeploymentState, new: DeploymentState) -> None:
    """Refuses an illegal step, with a sentence."""
    if new not in NEXT[old]:
        raise Conflict("illegal_transition", f"a deployment that is {old} cannot become {new}")
