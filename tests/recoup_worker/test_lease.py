import pytest
from sqlalchemy.exc import OperationalError

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.claims import Claim
from recoup_worker import lease as leases
from recoup_worker.lease import Lease

SECONDS = 0.3


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


class Database:
    """A ledger of one held job, whose database can be away."""

    def __init__(self):
        self.away, self.heard, self.written = False, "held", 0

    def renew(self, claim, seconds):
        if self.away:
            raise OperationalError("UPDATE", {}, Exception("connection refused"))
        return self.heard

    def pulse(self, job_id):
        return self.written


@pytest.fixture
def database():
    return Database()


@pytest.fixture
def clock(monkeypatch):
    """The lease's own: a machine under load has no part in what is tested here."""
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


@pytest.fixture
def lease(database, clock):
    request = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    return Lease(database, Claim("rec_1", 1, request), SECONDS)


def look_for(lease, clock, seconds):
    until = clock.now + seconds
    while clock.now < until:
        heard = lease.look()
        clock.now += 0.01
    return heard


def test_a_database_that_is_away_for_less_than_the_lease_costs_nothing(lease, database, clock):
    assert lease.look() == "held"
    database.away = True
    assert look_for(lease, clock, SECONDS / 2) == "held"
    database.away = False
    assert look_for(lease, clock, SECONDS) == "held"
    assert lease.was_away


def test_a_lease_that_could_not_be_renewed_is_lost_once_it_has_run_out(lease, database, clock):
    assert lease.look() == "held"
    database.away = True
    assert look_for(lease, clock, SECONDS * 1.5) == "lost"


@pytest.mark.parametrize("wish", ["cancel", "pause", "lost"])
def test_a_wish_is_heard_with_the_next_renewal(lease, database, clock, wish):
    lease.look()
    database.heard = wish
    assert look_for(lease, clock, SECONDS / 2) == wish


def test_a_job_about_which_nothing_is_written_is_quiet(lease, database, clock):
    look_for(lease, clock, SECONDS)
    assert lease.quiet_seconds >= SECONDS
    database.written += 1
    look_for(lease, clock, SECONDS / 2)
    assert lease.quiet_seconds < SECONDS
