import os

import pytest

from recoup_jobs.artifacts import publish
from recoup_jobs.garbage import collect
from recoup_jobs.stores import open_store
from recoup_jobs.tables import jobs

HOURS = 7200.0


@pytest.fixture
def claim(ledger, asked):
    return ledger.claim("worker", ["gpu.cpu"], 30, only=ledger.create(asked, "gpu.cpu").id)


@pytest.fixture
def folders(settings, ledger, claim):
    """A committed stage, one that a killed runner left, and what lay beside a publication."""
    places = [f"{claim.job_id}/{place}" for place in ("e1/preflight", "e1/distil", "e2/.artifacts.1f")]
    for place in places:
        settings.stage_folder(place).mkdir(parents=True)
    (settings.jobs_dir / claim.job_id / "runner.log").write_text("")
    ledger.commit_stage(claim, "preflight", places[0])
    return places


def left(settings, folders):
    return [place for place in folders if settings.stage_folder(place).exists()]


def age(ledger, seconds):
    with ledger.engine.begin() as conn:
        conn.execute(jobs.update().values(finished_at=jobs.c.finished_at - seconds))


def test_what_a_job_left_beside_its_committed_stages_goes_an_hour_after_its_end(
    ledger, settings, claim, folders
):
    ledger.fail(claim, "code", "message", retry=False)
    collect(ledger, settings)
    assert left(settings, folders) == folders
    age(ledger, HOURS)
    collect(ledger, settings)
    assert left(settings, folders) == folders[:1]
    assert (settings.jobs_dir / claim.job_id / "runner.log").exists()


def test_of_a_job_that_succeeded_nothing_stays_but_what_it_published(
    ledger, settings, claim, folders, tmp_path
):
    (tmp_path / "report").write_text("{}")
    store, place = open_store(settings), f"{claim.job_id}/e1/package"
    for lost in (f"{claim.job_id}/e2/package", place):
        publish(store, lost, {"report.json": tmp_path / "report"})
    ledger.commit_stage(claim, "package", place)
    ledger.succeed(claim, "recovered")
    age(ledger, HOURS)
    collect(ledger, settings)
    assert left(settings, folders) == []
    assert [name.rsplit("/", 1)[0] for name in store.names(claim.job_id)] == [
        f"{claim.job_id}/content",
        place,
    ]


def test_a_job_that_may_go_on_keeps_everything(ledger, settings, claim, folders):
    ledger.pause(claim.job_id)
    ledger.release(claim)
    collect(ledger, settings)
    assert left(settings, folders) == folders


def test_a_job_is_cleared_once(ledger, settings, claim, folders):
    ledger.fail(claim, "code", "message", retry=False)
    age(ledger, HOURS)
    collect(ledger, settings)
    settings.stage_folder(folders[1]).mkdir()
    collect(ledger, settings)
    assert left(settings, folders) == folders[:2]


def test_an_upload_that_broke_off_goes_after_a_day(ledger, settings):
    settings.files_dir.mkdir()
    old, new = settings.files_dir / ".file-1.part", settings.files_dir / ".file-2.part"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (1.0, 1.0))
    collect(ledger, settings)
    assert [*settings.files_dir.iterdir()] == [new]
