"""Where an answer falls into a loop and stays there.

Damaged models, pruned ones above all, end by saying one thing over and over. Such a tail
teaches nothing and costs most of a rollout's tokens, so it is cut before the teacher scores
it (ShortOPD, arXiv 2607.13124). A loop here is exact: the last tokens have a period p, shown
at least three times. Loops that count upwards or change a word are not found.
"""

from collections.abc import Sequence

MAX_PERIOD = 128
MIN_REPEATS = 3
MIN_TOKENS = 24
"""A shorter loop may be meant: a row of zeros, a line of a table."""
KEPT_PERIODS = 2
"""The first period may be right; where the second begins, the teacher can still say what should follow."""


def repetition_start(
    ids: Sequence[int],
    *,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_TOKENS,
) -> int | None:
    """The index at which the loop begins that `ids` ends in; None if it ends in none.

    The loop has the shortest period p <= `max_period` that the tail shows `min_repeats`
    times over at least `min_tokens` tokens; its last period may be incomplete.
    """
    loop = _loop(ids, max_period, min_repeats, min_tokens)
    return loop and loop[0]


def without_loop(ids: Sequence[int]) -> Sequence[int]:
    """`ids` with two periods left of the loop that it ends in, and of the loop around that one."""
    while loop := _loop(ids, MAX_PERIOD, MIN_REPEATS, MIN_TOKENS):
        start, period = loop
        ids = ids[: start + KEPT_PERIODS * period]
    return ids


def _loop(ids: Sequence[int], max_period: int, min_repeats: int, min_tokens: int) -> tuple[int, int] | None:
    """(start, period) of the final loop.

    A period that fails is given up within `min_repeats` of its lengths or `min_tokens`, so
    the search is linear in `ids` and at worst quadratic in `max_period`.
    """
    for period in range(1, min(max_period, len(ids) // min_repeats) + 1):
        start = len(ids) - period
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(min_repeats * period, min_tokens):
            return start, period
    return None
