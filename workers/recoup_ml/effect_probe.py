"""What a server of the recovered weights must find again: held-out answers, and how likely they were.

A server that loads an adapter and serves the base without it looks well from outside. So a recovery hands
over token ids of test answers with log p(answer | prompt) under the student and under what was trained, as
the evaluation measured them; `recoup_jobs/effect.py` holds a server to them.
"""

from collections.abc import Sequence

from recoup.schemas import ProbeRow
from recoup_ml.scores import Scores
from recoup_ml.sequences import Answered

ROWS, LONGEST = 8, 512


def probe_rows(test: Sequence[Answered], before: Scores, after: Scores) -> list[ProbeRow]:
    """The test answers whose likelihood a token changed most, among sequences of at most `LONGEST` tokens."""
    short = [row for row, sequence in enumerate(test) if len(sequence) <= LONGEST]
    changed = sorted(short, key=lambda row: -_change(test, before, after, row))
    return [
        ProbeRow(
            prompt_ids=list(test[row].prompt_ids),
            answer_ids=list(test[row].answer_ids),
            base=-before.nll[row],
            recovered=-after.nll[row],
        )
        for row in changed[:ROWS]
    ]


def _change(test: Sequence[Answered], before: Scores, after: Scores, row: int) -> float:
    """Nats a token."""
    return abs(after.nll[row] - before.nll[row]) / len(test[row].answer_ids)
