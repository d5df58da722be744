"""What a server of the recovered weights must find again: how likely a few tokens of held-out answers were.

A server that loads an adapter and serves the base without it looks well from outside. So a recovery hands
over token ids of test answers with log p(token | what is before it) under the student and under what was
trained, as the evaluation measured them; `recoup_jobs/effect.py` holds a server to them.
"""

from collections.abc import Sequence

from recoup.schemas import ProbeRow
from recoup_ml.scores import Scores
from recoup_ml.sequences import Answered

ROWS, LONGEST = 16, 512
"""Tokens, each of another answer; a server reads at most so many before each."""


def probe_rows(test: Sequence[Answered], before: Scores, after: Scores) -> list[ProbeRow]:
    """Of each test answer the token whose likelihood changed most, for the answers where it changed most."""
    found = [
        _most_changed(sequence, before.token_nll[row], after.token_nll[row])
        for row, sequence in enumerate(test)
        if len(sequence) <= LONGEST
    ]
    return sorted(found, key=lambda row: -abs(row.recovered - row.base))[:ROWS]


def _most_changed(sequence: Answered, before: Sequence[float], after: Sequence[float]) -> ProbeRow:
    place = max(range(len(before)), key=lambda at: abs(after[at] - before[at]))
    return ProbeRow(
        ids=[*sequence.prompt_ids, *sequence.answer_ids[:place]],
        token=sequence.answer_ids[place],
        base=-before[place],
        recovered=-after[place],
    )
