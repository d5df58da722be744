import pytest

from recoup.schemas import ChangeRecovery
from recoup_jobs.errors import Conflict
from recoup_jobs.tables import jobs

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)

CPU = ["gpu.cpu"]


@pytest.fixture
def job(ledger, asked):
    return ledger.create(asked, "gpu.cpu")


@pytest.fixture
def claim(ledger, job):
    return ledger.claim("worker", CPU, 30)


def states(ledger, id):
    return [event.data["state"] for event in ledger.events(id, 0, 100).data if event.type == "state"]


def test_a_queued_job_that_is_paused_is_claimed_only_once_it_is_resumed(ledger, job):
    assert ledger.pause(job.id).state == "paused"
    assert ledger.claim("worker", CPU, 30) is None
    assert ledger.due(-1) == []
    assert ledger.resume(job.id).state == "queued"
    assert ledger.due(60) == [(job.id, "gpu.cpu")]
    assert ledger.claim("worker", CPU, 30).job_id == job.id


def test_a_running_job_is_paused_once_its_worker_lets_go_of_it(ledger, claim):
    asked = ledger.pause(claim.job_id)
    assert (asked.state, asked.pausing) == ("running", True)
    assert ledger.renew(claim, 30) == "pause"
    ledger.release(claim)
    paused = ledger.get(claim.job_id)
    assert (paused.state, paused.pausing) == ("paused", False)


def test_asking_twice_for_a_pause_changes_nothing(ledger, claim):
    assert ledger.pause(claim.job_id) == ledger.pause(claim.job_id)


def test_a_pause_can_be_taken_back_before_the_worker_hears_of_it(ledger, claim):
    ledger.pause(claim.job_id)
    assert not ledger.resume(claim.job_id).pausing
    assert ledger.renew(claim, 30) == "held"


def test_a_job_whose_worker_vanished_during_a_pause_is_paused(ledger, claim):
    ledger.pause(claim.job_id)
    ledger.renew(claim, -1)
    ledger.take_back()
    assert ledger.get(claim.job_id).state == "paused"


def test_a_failure_during_a_pause_waits_with_its_retry(ledger, claim):
    ledger.pause(claim.job_id)
    ledger.fail(claim, "teacher_unavailable", "no answer", retry=True)
    assert ledger.get(claim.job_id).state == "paused"


def test_cancelling_goes_before_pausing(ledger, claim):
    ledger.pause(claim.job_id)
    ledger.cancel(claim.job_id)
    assert ledger.renew(claim, 30) == "cancel"
    ledger.release(claim)
    assert ledger.get(claim.job_id).state == "cancelled"


def test_a_paused_job_is_cancelled_at_once(ledger, job):
    ledger.pause(job.id)
    assert ledger.cancel(job.id).state == "cancelled"
    assert states(ledger, job.id) == ["queued", "paused", "cancelled"]


def test_a_retry_is_a_new_job_that_takes_over_what_was_committed(ledger, claim):
    for stage in ("preflight", "package"):
        ledger.commit_stage(claim, stage, f"{claim.job_id}/e1/{stage}")
    ledger.fail(claim, "non_finite_weights", "NaN", retry=False)
    ended = ledger.get(claim.job_id), ledger.events(claim.job_id, 0, 100)
    again = ledger.retry(claim.job_id)
    assert (again.state, again.retry_of, again.failures) == ("queued", claim.job_id, 0)
    assert again.request == ended[0].request
    assert ledger.committed(again.id) == {"preflight": f"{claim.job_id}/e1/preflight"}
    assert ledger.events(again.id, 0, 10).data[0].data["committed"] == ["preflight"]
    assert (ledger.get(claim.job_id), ledger.events(claim.job_id, 0, 100)) == ended
    assert ledger.claim("worker", CPU, 30).job_id == again.id


def test_what_has_not_failed_is_not_retried(ledger, claim):
    with pytest.raises(Conflict, match="is running"):
        ledger.retry(claim.job_id)


def test_another_priority_changes_who_is_next(ledger, asked, job):
    later = ledger.create(asked, "gpu.cpu")
    changed = ledger.change(later.id, ChangeRecovery(priority=7))
    assert (changed.request.priority, changed.version) == (7, later.version + 1)
    assert ledger.claim("worker", CPU, 30).job_id == later.id


def test_metadata_are_replaced_and_the_rest_stays(ledger, job):
    ledger.change(job.id, ChangeRecovery(metadata={"team": "a"}))
    changed = ledger.change(job.id, ChangeRecovery(metadata={"run": "2"}))
    assert changed.request == job.request.model_copy(update={"metadata": {"run": "2"}})


def test_a_job_that_has_ended_keeps_its_priority_but_can_be_labelled(ledger, job):
    ledger.cancel(job.id)
    assert ledger.change(job.id, ChangeRecovery(metadata={"a": "b"})).request.metadata == {"a": "b"}
    with pytest.raises(Conflict, match="is cancelled"):
        ledger.change(job.id, ChangeRecovery(priority=1))


def test_the_time_that_earlier_claims_took_is_kept_and_waiting_costs_none(ledger, claim):
    with ledger.engine.begin() as conn:
        conn.execute(jobs.update().values(claimed_at=jobs.c.claimed_at - 40))
    ledger.pause(claim.job_id)
    ledger.release(claim)
    ledger.resume(claim.job_id)
    assert ledger.claim("worker", CPU, 30).spent_seconds == pytest.approx(40, abs=5)


def test_a_worker_that_vanished_spent_no_time_past_its_lease(ledger, claim):
    with ledger.engine.begin() as conn:
        conn.execute(jobs.update().values(claimed_at=jobs.c.claimed_at - 40))
    ledger.renew(claim, -30)
    assert ledger.claim("worker", CPU, 30).spent_seconds == pytest.approx(10, abs=5)
