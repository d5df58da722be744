"""What the service answers when it is asked what a recovery would do: nothing is queued."""

from typing import Literal

from recoup.schemas.recovery import Output, ProblemItem
from recoup.schemas.report import Choice, CostEstimate


class DryRun(Output):
    """The plan of a recovery that was not queued."""

    object: Literal["recovery.dry_run"]
    plan: list[Choice]
    """Every `auto`, with what it would become and why; empty where a model cannot be read."""
    findings: list[ProblemItem]
    """All that the recovery would be refused for, as preflight says it; empty: it would be accepted."""
    warnings: list[ProblemItem]
    """Why vLLM could not serve what comes of it; with `output.servable` these are findings."""
    estimate: CostEstimate | None
    """Null where there is no plan."""
