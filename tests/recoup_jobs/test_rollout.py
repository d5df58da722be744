import pytest

from recoup_jobs.errors import Conflict
from recoup_jobs.rollout import NEXT, WANTED, check


def test_every_state_ends_withdrawn_and_only_that_is_the_end():
    assert all("withdrawn" in following for state, following in NEXT.items() if state != "withdrawn")
    assert not NEXT["withdrawn"]
    assert {state for state, following in NEXT.items() if "live" in following} == {"probing"}
    assert set(WANTED) < NEXT.keys()
    with pytest.raises(Conflict, match="failed cannot become live"):
        check("failed", "live")
