import itertools
from typing import get_args

import pytest

from recoup.schemas import State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.errors import Conflict
from recoup_jobs.lifecycle import check

STATES = get_args(State)
LEGAL = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "cancelling"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("cancelling", "cancelled"),
    ("cancelling", "succeeded"),
    ("cancelling", "failed"),
}


def allowed(old, new):
    try:
        check(old, new)
    except Conflict:
        return False
    return True


def test_only_the_drawn_steps_are_legal():
    assert {step for step in itertools.product(STATES, STATES) if allowed(*step)} == LEGAL


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_a_job_that_has_ended_says_so(state):
    with pytest.raises(Conflict, match=f"ended as {state}") as refusal:
        check(state, "running")
    assert refusal.value.code == "job_terminal"
