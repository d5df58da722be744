from itertools import pairwise

import pytest
from sqlalchemy.exc import StatementError

from recoup.schemas import ChangeRecovery, Progress
from recoup_jobs.errors import BadRequest, Conflict, NotFound, StaleClaim
from recoup_jobs.filters import Wanted

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)

CPU = ["gpu.cpu"]


@pytest.fixture
def job(ledger, asked):
    return ledger.create(asked, "gpu.cpu")


@pytest.fixture
def claim(ledger, job):
    return ledger.claim("worker", CPU, 30)


def history(ledger, id, type="state"):
    return [event.data for event in ledger.events(id, 0, 100).data if event.type == type]


def test_a_new_job_is_queued_and_has_its_first_event(ledger, asked, job):
    assert (job.state, job.epoch, job.version, job.request) == ("queued", 0, 1, asked)
    assert history(ledger, job.id) == [{"state": "queued", "from": None}]


@pytest.mark.parametrize("id", ["rec_000000000000000000000000", "rec_", "../../etc/passwd", "rec_\x00"])
def test_an_unknown_job_is_not_found(ledger, id):
    for ask in (ledger.get, ledger.cancel, lambda id: ledger.events(id, 0, 1)):
        with pytest.raises(NotFound):
            ask(id)


def test_pages_hold_every_job_once_and_the_newest_first(ledger, asked):
    created = [ledger.create(asked, "gpu.cpu").id for _ in range(5)]
    pages = [ledger.list(None, 2)]
    while pages[-1].has_more:
        pages.append(ledger.list(pages[-1].next_cursor, 2))
    assert [job.id for page in pages for job in page.data] == created[::-1]
    assert [len(page.data) for page in pages] == [2, 2, 1]


def test_a_list_can_be_of_one_state(ledger, asked, claim):
    waiting = ledger.create(asked, "gpu.cpu")
    assert [job.id for job in ledger.list(None, 10, Wanted("queued")).data] == [waiting.id]


def test_a_list_can_be_of_one_outcome(ledger, asked, claim):
    ledger.succeed(claim, "no_gain")
    ledger.create(asked, "gpu.cpu")
    assert [job.id for job in ledger.list(None, 10, Wanted(outcome="no_gain")).data] == [claim.job_id]
    assert ledger.list(None, 10, Wanted(outcome="recovered")).data == []


def test_a_list_can_be_of_what_requests_say(ledger, asked):
    pruned = ledger.create(asked.model_copy(update={"damage": "pruning"}), "gpu.cpu")
    ledger.create(asked, "gpu.cpu")
    assert [job.id for job in ledger.list(None, 10, Wanted(damage="pruning")).data] == [pruned.id]


@pytest.mark.parametrize("key", ["team", 'a"b', "a'b", "$.x", "a.b", "[0]", "ключ", "%", "\\", "a b", "*"])
def test_a_list_can_be_of_one_pair_of_metadata_whatever_its_key(ledger, asked, key):
    pairs = [{key: "red"}, {key: "blue"}, {"other": "red"}, {}]
    made = [ledger.create(asked.model_copy(update={"metadata": pair}), "gpu.cpu").id for pair in pairs]
    found = ledger.list(None, 10, Wanted(metadata=((key, "red"),)))
    assert [job.id for job in found.data] == [made[0]]


def test_every_pair_and_every_filter_must_hold(ledger, asked):
    both = asked.model_copy(update={"metadata": {"a": "1", "b": "2"}})
    one = asked.model_copy(update={"metadata": {"a": "1"}})
    made = [ledger.create(request, "gpu.cpu").id for request in (both, one)]
    wanted = Wanted("queued", metadata=(("a", "1"), ("b", "2")))
    assert [job.id for job in ledger.list(None, 10, wanted).data] == made[:1]


def test_other_metadata_of_a_job_is_found_once_it_was_changed(ledger, job):
    ledger.change(job.id, ChangeRecovery(metadata={"team": "blue"}))
    assert [j.id for j in ledger.list(None, 10, Wanted(metadata=(("team", "blue"),))).data] == [job.id]


@pytest.mark.parametrize("cursor", ["rec_000000000000000000000000", "7", "x\x00"])
def test_a_made_up_cursor_is_refused(ledger, cursor):
    with pytest.raises(BadRequest, match="next_cursor"):
        ledger.list(cursor, 10)


def test_events_have_no_gaps_and_come_in_pages(ledger, claim):
    for step in range(5):
        ledger.event(claim, "metric", {"step": step})
    first = ledger.events(claim.job_id, 0, 4)
    rest = ledger.events(claim.job_id, int(first.next_cursor), 100)
    assert [event.seq for event in first.data + rest.data] == list(range(1, 8))
    assert (first.has_more, rest.has_more) == (True, False)


def test_a_number_that_is_not_json_never_enters_the_history(ledger, claim):
    with pytest.raises((StatementError, ValueError), match="JSON"):
        ledger.event(claim, "metric", {"loss": float("nan")})


def test_the_version_grows_with_every_change(ledger, claim):
    job_id = claim.job_id
    changes = [
        lambda: ledger.enter_stage(claim, "preflight"),
        lambda: ledger.progress(claim, progress(1)),
        lambda: ledger.commit_stage(claim, "preflight", "e1/preflight"),
        lambda: ledger.cancel(job_id),
        lambda: ledger.cancelled(claim),
    ]
    versions = [ledger.get(job_id).version]
    for change in changes:
        change()
        versions.append(ledger.get(job_id).version)
    assert all(earlier < later for earlier, later in pairwise(versions))


def progress(done):
    return Progress(stage="preflight", done=done, total=9, unit="steps", eta_seconds=None)


def test_progress_shows_until_the_stage_ends(ledger, claim):
    ledger.progress(claim, progress(4))
    assert ledger.get(claim.job_id).progress == progress(4)
    ledger.enter_stage(claim, "diagnose")
    job = ledger.get(claim.job_id)
    assert (job.stage, job.progress) == ("diagnose", None)


def test_a_queued_job_is_cancelled_at_once(ledger, job):
    cancelled = ledger.cancel(job.id)
    assert cancelled.state == "cancelled"
    assert cancelled.finished_at is not None
    assert ledger.claim("worker", CPU, 30) is None


def test_cancelling_a_running_job_asks_its_worker_to_stop(ledger, claim):
    assert ledger.renew(claim, 30) == "held"
    assert ledger.cancel(claim.job_id).state == "cancelling"
    assert ledger.renew(claim, 30) == "cancel"
    ledger.cancelled(claim)
    assert ledger.get(claim.job_id).state == "cancelled"


def test_cancelling_twice_is_the_same_answer(ledger, claim):
    assert ledger.cancel(claim.job_id) == ledger.cancel(claim.job_id)


def test_a_job_that_has_ended_cannot_be_cancelled(ledger, claim):
    ledger.succeed(claim, "recovered")
    with pytest.raises(Conflict) as refusal:
        ledger.cancel(claim.job_id)
    assert refusal.value.code == "job_terminal"


def test_a_job_that_nobody_cancelled_does_not_end_as_cancelled(ledger, claim):
    with pytest.raises(Conflict, match="running"):
        ledger.cancelled(claim)


def test_success_keeps_its_outcome_and_is_final(ledger, claim):
    ledger.succeed(claim, "partial")
    job = ledger.get(claim.job_id)
    assert (job.state, job.outcome) == ("succeeded", "partial")
    with pytest.raises(StaleClaim):
        ledger.fail(claim, "late", "too late", retry=True)
    assert ledger.get(claim.job_id) == job


def test_a_failure_is_tried_again_until_it_has_failed_often_enough(ledger, job):
    states = []
    for _ in range(3):
        claim = ledger.claim("worker", CPU, 30, only=job.id)
        ledger.fail(claim, "teacher_unavailable", "no answer", retry=True)
        states.append(ledger.get(job.id).state)
    assert states == ["queued", "queued", "failed"]
    assert ledger.get(job.id).error.code == "teacher_unavailable"


def test_a_failure_that_no_retry_mends_ends_the_job(ledger, claim):
    ledger.fail(claim, "deadline_exceeded", "it took too long", retry=False)
    assert ledger.get(claim.job_id).state == "failed"
    assert ledger.get(claim.job_id).error.message == "it took too long"


def test_a_cancelled_job_that_fails_is_not_tried_again(ledger, claim):
    ledger.cancel(claim.job_id)
    ledger.fail(claim, "killed", "the runner was killed", retry=True)
    assert ledger.get(claim.job_id).state == "cancelled"


def test_a_stage_is_committed_once(ledger, claim):
    ledger.commit_stage(claim, "generate", "e1/generate")
    with pytest.raises(Conflict) as refusal:
        ledger.commit_stage(claim, "generate", "e1/again")
    assert refusal.value.code == "stage_committed"
    assert ledger.committed(claim.job_id) == {"generate": "e1/generate"}


def test_stages_leave_their_history(ledger, claim):
    ledger.enter_stage(claim, "generate")
    ledger.commit_stage(claim, "generate", "e1/generate")
    assert history(ledger, claim.job_id, "stage") == [
        {"stage": "generate", "status": "started"},
        {"stage": "generate", "status": "committed"},
    ]


def test_a_hint_is_due_until_it_is_published_and_again_when_nobody_followed_it(ledger, job):
    assert ledger.due(60) == [(job.id, "gpu.cpu")]
    ledger.mark_published(job.id)
    assert ledger.due(60) == []
    assert ledger.due(-1) == [(job.id, "gpu.cpu")]


def test_a_running_job_needs_no_hint_while_its_lease_holds(ledger, claim):
    assert ledger.due(-1) == []
    ledger.renew(claim, -1)
    assert ledger.due(60) == [(claim.job_id, "gpu.cpu")]
    ledger.mark_published(claim.job_id)
    assert ledger.due(60) == []
