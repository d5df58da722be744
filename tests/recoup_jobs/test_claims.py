import threading
import time

import pytest

from recoup.schemas import Progress
from recoup_jobs.errors import StaleClaim

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)

CPU = ["gpu.cpu"]
EXPIRED = -1.0


@pytest.fixture
def job(ledger, asked):
    return ledger.create(asked, "gpu.cpu")


@pytest.fixture
def zombie(ledger, job):
    """A claim whose job another worker has taken over."""
    stale = ledger.claim("first", CPU, EXPIRED)
    assert ledger.claim("second", CPU, 30).epoch == 2
    return stale


def reasons(ledger, id):
    return [event.data.get("reason") for event in ledger.events(id, 0, 100).data]


def race(workers, work):
    """Each worker's result, all of them let go at the same moment."""
    barrier, results = threading.Barrier(workers), []

    def run(number):
        barrier.wait()
        results.append(work(number))

    threads = [threading.Thread(target=run, args=[number]) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_race_for_one_job_has_one_winner(ledger, job):
    claims = race(8, lambda number: ledger.claim(f"worker {number}", CPU, 30))
    assert [claim.job_id for claim in claims if claim] == [job.id]
    assert ledger.get(job.id).epoch == 1


def test_a_race_for_many_jobs_gives_each_to_one_worker(ledger, asked):
    jobs = {ledger.create(asked, "gpu.cpu").id for _ in range(6)}
    claims = race(6, lambda number: ledger.claim(f"worker {number}", CPU, 30))
    assert {claim.job_id for claim in claims} == jobs


def test_events_written_at_once_have_no_gaps_and_no_twins(ledger, job):
    claim = ledger.claim("worker", CPU, 30)
    race(6, lambda number: [ledger.event(claim, "log", {"line": step}) for step in range(3)])
    assert [event.seq for event in ledger.events(job.id, 0, 100).data] == list(range(1, 21))


def test_the_claim_carries_the_request_and_starts_the_job(ledger, asked, job):
    claim = ledger.claim("worker", CPU, 30)
    assert (claim.job_id, claim.epoch, claim.request) == (job.id, 1, asked)
    assert ledger.get(job.id).started_at is not None


def test_a_runner_that_knows_job_and_epoch_gets_the_same_claim(ledger, job):
    claim = ledger.claim("worker", CPU, 30)
    assert ledger.claimed(claim.job_id, claim.epoch) == claim


def test_the_most_urgent_job_is_claimed_first_then_the_oldest(ledger, asked):
    urgent = asked.model_copy(update={"priority": 5})
    first, second = (ledger.create(asked, "gpu.cpu").id for _ in range(2))
    best = ledger.create(urgent, "gpu.cpu").id
    assert [ledger.claim("worker", CPU, 30).job_id for _ in range(3)] == [best, first, second]


@pytest.fixture
def submit(ledger, asked):
    """`submit("a", "a", "b")`: a job for each of these tenants, in this order."""
    return lambda *tenants, queue="gpu.cpu", **changes: [
        ledger.create(asked.model_copy(update=changes), queue, tenant).id for tenant in tenants
    ]


def claimed(ledger, jobs, count):
    """Which of the jobs are claimed one after the other, by their places in the list."""
    return [jobs.index(ledger.claim("worker", CPU, 30).job_id) for _ in range(count)]


def test_a_tenant_with_many_jobs_does_not_keep_the_others_waiting(ledger, submit):
    jobs = submit("a", "a", "a", "b", "b", "c")
    assert claimed(ledger, jobs, 6) == [0, 3, 5, 1, 4, 2]


def test_a_share_counts_what_runs_and_not_what_ran(ledger, submit):
    jobs = submit("a", "a", "a", "b", "b")
    first, second = (ledger.claim("worker", CPU, 30) for _ in range(2))
    assert [first.job_id, second.job_id] == [jobs[0], jobs[3]]
    ledger.succeed(first, "recovered")
    assert claimed(ledger, jobs, 3) == [1, 2, 4]


def test_priority_comes_before_a_fair_share(ledger, submit):
    jobs = submit("a", "b") + submit("a", "a", priority=1)
    assert claimed(ledger, jobs, 4) == [2, 3, 1, 0]


def test_a_share_is_one_of_the_same_class_of_machine(ledger, submit):
    submit("a", "a", queue="gpu.1x80g")
    assert ledger.claim("worker", ["gpu.1x80g"], 30) and ledger.claim("worker", ["gpu.1x80g"], 30)
    assert claimed(ledger, submit("a", "b"), 2) == [0, 1]


def test_a_race_between_tenants_gives_each_job_to_one_worker(ledger, submit):
    jobs = submit(*"aaabbc")
    claims = race(6, lambda number: ledger.claim(f"worker {number}", CPU, 30))
    assert sorted(claim.job_id for claim in claims) == sorted(jobs)


def test_a_worker_claims_from_its_own_queues_only(ledger, job):
    assert ledger.claim("worker", ["gpu.8x80g"], 30) is None


def test_a_worker_can_ask_for_one_job(ledger, asked, job):
    other = ledger.create(asked, "gpu.cpu")
    assert ledger.claim("worker", CPU, 30, only=other.id).job_id == other.id
    assert ledger.claim("worker", CPU, 30, only=other.id) is None


def test_a_job_whose_lease_ran_out_is_taken_over_under_the_next_epoch(ledger, job):
    ledger.claim("first", CPU, EXPIRED)
    assert ledger.claim("second", CPU, 30).epoch == 2
    assert "lease_expired" in reasons(ledger, job.id)


def test_a_lease_that_is_renewed_is_not_taken_over(ledger, job):
    claim = ledger.claim("first", CPU, EXPIRED)
    assert ledger.renew(claim, 30) == "held"
    assert ledger.claim("second", CPU, 30) is None


def test_a_zombie_learns_that_it_lost_the_job(ledger, zombie):
    assert ledger.renew(zombie, 30) == "lost"


@pytest.mark.parametrize(
    "write",
    [
        lambda ledger, claim: ledger.enter_stage(claim, "distil"),
        lambda ledger, claim: ledger.commit_stage(claim, "distil", "e1/distil"),
        lambda ledger, claim: ledger.progress(
            claim, Progress(stage="distil", done=1, total=2, unit="steps", eta_seconds=None)
        ),
        lambda ledger, claim: ledger.event(claim, "log", {}),
        lambda ledger, claim: ledger.succeed(claim, "recovered"),
        lambda ledger, claim: ledger.fail(claim, "code", "message", retry=True),
        lambda ledger, claim: ledger.cancelled(claim),
        lambda ledger, claim: ledger.release(claim),
    ],
    ids=["enter", "commit", "progress", "event", "succeed", "fail", "cancelled", "release"],
)
def test_nothing_that_a_zombie_writes_is_kept(ledger, job, zombie, write):
    before = ledger.get(job.id), ledger.events(job.id, 0, 100)
    with pytest.raises(StaleClaim, match="epoch 1"):
        write(ledger, zombie)
    assert (ledger.get(job.id), ledger.events(job.id, 0, 100)) == before


def test_a_released_job_goes_to_the_next_worker_with_its_stages(ledger, job):
    claim = ledger.claim("first", CPU, 30)
    ledger.commit_stage(claim, "preflight", "e1/preflight")
    ledger.release(claim)
    assert ledger.get(job.id).state == "queued"
    assert ledger.due(60) == [(job.id, "gpu.cpu")]
    assert ledger.claim("second", CPU, 30).epoch == 2
    assert ledger.committed(job.id) == {"preflight": "e1/preflight"}


def test_releasing_a_job_that_is_to_be_cancelled_cancels_it(ledger, job):
    claim = ledger.claim("worker", CPU, 30)
    ledger.cancel(job.id)
    ledger.release(claim)
    assert ledger.get(job.id).state == "cancelled"


def test_a_job_that_takes_its_workers_down_fails_in_the_end(ledger, job):
    while ledger.claim("doomed", CPU, EXPIRED) is not None:
        pass
    failed = ledger.get(job.id)
    assert (failed.state, failed.epoch, failed.error.code) == ("failed", 5, "infrastructure_losses")


def test_failures_of_the_job_and_losses_of_workers_are_counted_apart(ledger, job):
    for _ in range(2):
        ledger.fail(ledger.claim("worker", CPU, 30), "teacher_unavailable", "no answer", retry=True)
    for _ in range(4):
        ledger.claim("doomed", CPU, EXPIRED)
    assert ledger.claim("last", CPU, 30).epoch == 7


def test_a_job_that_was_to_be_cancelled_ends_when_its_worker_vanished(ledger, asked, job):
    ledger.claim("first", CPU, EXPIRED)
    ledger.cancel(job.id)
    other = ledger.create(asked, "gpu.cpu")
    assert ledger.due(60) == [(job.id, "gpu.cpu"), (other.id, "gpu.cpu")]
    assert ledger.claim("second", CPU, 30).job_id == other.id
    assert ledger.get(job.id).state == "cancelled"


@pytest.mark.parametrize("offset", [-10 * 86_400, 10 * 86_400], ids=["past", "future"])
def test_a_machine_whose_clock_jumps_claims_nothing_that_is_held(ledger, job, monkeypatch, offset):
    ledger.claim("one", CPU, 30)
    moment = time.time() + offset
    monkeypatch.setattr(time, "time", lambda: moment)
    assert ledger.claim("two", CPU, 30) is None
    ledger.take_back()
    assert ledger.get(job.id).state == "running"
