"""A crash just before and just after every commit of a recovery, one recovery a point.

The quick test crashes its own thread of work, at every point. The slow one kills processes of an
installation (`crashing/sitecustomize.py`), at points of each kind.
"""

import importlib.util
import sys
import threading
from itertools import count
from types import SimpleNamespace

import pytest
from sqlalchemy import update
from sqlalchemy.engine.default import DefaultDialect

from recoup_jobs.ledger import open_ledger
from recoup_jobs.tables import jobs
from recoup_worker.runner import run_claimed


class Crash(BaseException):
    """The process is gone: nothing that handles errors may see it."""


@pytest.fixture
def ledger(settings):
    ledger = open_ledger(settings)
    yield ledger
    ledger.close()


@pytest.fixture
def commits(monkeypatch):
    """Numbers all commits; `crash_at` makes one of them the last."""
    commit, at = DefaultDialect.do_commit, SimpleNamespace(counter=count(1), number=0, when="")

    def do_commit(self, connection):
        number = next(at.counter)
        if (number, at.when) == (at.number, "before"):
            raise Crash
        commit(self, connection)
        if (number, at.when) == (at.number, "after"):
            raise Crash

    def crash_at(number, when):
        at.counter, at.number, at.when = count(1), number, when

    monkeypatch.setattr(DefaultDialect, "do_commit", do_commit)
    return SimpleNamespace(crash_at=crash_at, done=lambda: next(at.counter) - 1)


@pytest.fixture
def attempt(monkeypatch, light, ledger, settings):
    """One worker and one runner, in this thread; whether they lived to the end of the job."""
    spec = importlib.util.spec_from_file_location("light_recipe", light / "recoup_ml" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.STEPS, recipe.STEP_SECONDS = 1, 0.0
    monkeypatch.setitem(sys.modules, "recoup_ml.recipe", recipe)

    def attempt():
        try:
            if claim := ledger.claim("worker", [settings.queue], 30):
                run_claimed(claim, ledger, settings, threading.Event())
        except Crash:
            return False
        return True

    return attempt


def expire_leases(ledger):
    with ledger.engine.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.lease_until.is_not(None)).values(lease_until=0.0))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_commit_costs_a_try_and_nothing_else(
    ledger, settings, asked, commits, attempt, violations, when
):
    ids = [ledger.create(asked, settings.queue).id]
    commits.crash_at(0, when)
    attempt()
    points = commits.done()
    assert points > 20
    for point in range(1, points + 1):
        ids.append(ledger.create(asked, settings.queue).id)
        commits.crash_at(point, when)
        assert not attempt()
        commits.crash_at(0, when)
        expire_leases(ledger)
        ledger.take_back()
        assert attempt()
    assert {ledger.get(id).state for id in ids} == {"succeeded"}
    assert violations(SimpleNamespace(ledger=ledger, settings=settings, jobs=ids)) == []


POINTS = [
    f"{role}:{when}:{n}" for role in ("runner", "worker") for when in ("before", "after") for n in (1, 2, 4)
]
POINTS += [f"runner:{when}:{number}" for when in ("before", "after") for number in (9, 16, 23)]
POINTS += ["runner:rename:1"]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_dies_at_a_commit_is_followed_by_another(installation, tmp_path, point):
    mark = tmp_path / "crashed"
    crashing = installation.start_worker(RECOUP_CRASH_AT=f"{point}:{mark}")
    job = installation.submit()
    if point.startswith("worker"):
        crashing.wait(60)
        installation.start_worker()
    installation.wait_for_end()
    assert mark.exists()
    assert installation.state(job) == "succeeded"
