"""What the service answers when it is asked what a recovery would do: nothing is queued."""

from typing import Literal

from recoup.schemas.recovery import Output, ProblemItem
from recoup.schemas.report import Choice


class CostEstimate(Output):
    """What the recovery would take."""

    tokens: int
    """Generated and trained on."""
    memory_bytes: int
    """At its highest."""
    disk_bytes: int
    seconds: float


class DryRun(Output):
    """The plan of a recovery that was not queued."""

    object: Literal["recovery.dry_run"]
    plan: list[Choice]
    """Every `auto`, with what it would become and why."""
    findings: list[ProblemItem]
    """What preflight has to say; a request that would be refused is refused here, too."""
    estimate: CostEstimate
