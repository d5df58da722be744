"""When training has done what it can: read off the validation KL, never off the training loss.

The idea is the QAD recipe's (arXiv 2601.20088, ModelOpt): stop when the gap is closed, when
things get worse than they were, and when they stop getting better.
"""

from collections.abc import Sequence

from recoup.schemas import Stopped

CLOSED = 0.01
"""The gap counts as closed when this share of it is left."""
PATIENCE = 3
"""Validations in a row that may pass without a gain, or worse than the start."""
LEAST_GAIN = 0.002
"""Share of the gap at the start that counts as a gain."""


def reason_to_stop(
    before: float, floor: float, validations: Sequence[float], patience: int = PATIENCE
) -> Stopped | None:
    """Why to stop after these validations, or None to go on; all are mean token KL, nats.

    Args:
        before: of the student before training.
        floor: of the teacher against itself after rounding, which no student can get below.
        validations: so far, in order, the phases before included.
    """
    if not validations:
        return None
    gap = before - floor
    if validations[-1] - floor <= CLOSED * gap:
        return "gap_closed"
    last = validations[-patience:]
    if len(last) == patience and min(last) > before:
        return "regression"
    earlier = min([before, *validations[:-patience]])
    if len(last) == patience and min(last) > earlier - LEAST_GAIN * gap:
        return "plateau"
    return None
