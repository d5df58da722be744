import itertools
from typing import get_args

import pytest

from recoup.schemas import State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.errors import Conflict
from recoup_jobs.lifecycle import ASKED_IN, check, require

STATES = get_args(State)
LEGAL = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("queued", "paused"),
    ("paused", "queued"),
    ("paused", "cancelled"),
    ("running", "paused"),
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


@pytest.mark.parametrize(("verb", "state"), [*itertools.product(ASKED_IN, STATES)])
def test_a_verb_out_of_place_is_refused_by_naming_the_state(verb, state):
    if state in ASKED_IN[verb]:
        require(verb, state)
        return
    with pytest.raises(Conflict, match=f"the recovery is {state}; {verb} is for one that is"):
        require(verb, state)
