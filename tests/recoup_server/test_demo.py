"""What the demo does with what an earlier one left in its home."""

from types import SimpleNamespace

from recoup_server.demo import MADE_HERE, _cancel_leftovers


class Recoveries:
    """Jobs by id: (state, metadata)."""

    def __init__(self, jobs):
        self.jobs = jobs

    def list(self, state, metadata):
        for id, (has, made) in [*self.jobs.items()]:
            if has == state and metadata.items() <= made.items():
                yield SimpleNamespace(id=id)

    def cancel(self, id):
        self.jobs[id] = ("cancelled", self.jobs[id][1])


def test_recoveries_of_a_demo_that_was_broken_off_are_cancelled_and_no_others():
    jobs = {
        "left": ("running", MADE_HERE),
        "waits": ("queued", MADE_HERE),
        "done": ("succeeded", MADE_HERE),
        "theirs": ("queued", {"ticket": "42"}),
    }
    _cancel_leftovers(SimpleNamespace(recoveries=Recoveries(jobs)))
    assert {id: state for id, (state, _) in jobs.items()} == {
        "left": "cancelled",
        "waits": "cancelled",
        "done": "succeeded",
        "theirs": "queued",
    }
