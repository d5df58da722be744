from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.exc import IntegrityError

from recoup_jobs.group_commit import GroupCommit
from recoup_jobs.tables import leaders

WRITERS = 8


@pytest.fixture
def group(ledger):
    return GroupCommit(ledger.engine)


@pytest.fixture
def commits(ledger):
    seen = []
    event.listen(ledger.engine, "commit", seen.append)
    return seen


def told_by(role):
    """A write of one row, which answers its role."""

    def write(conn):
        conn.execute(insert(leaders).values(role=role, owner=None, until=0.0))
        return role

    return write


def while_one_is_at_work(group, writes):
    """What came of writes that all came while another was at work; that one came first."""
    begun, go_on = Event(), Event()

    def slow(conn):
        begun.set()
        assert go_on.wait(10)
        return told_by("slow")(conn)

    with ThreadPoolExecutor(len(writes) + 1) as pool:
        first = pool.submit(group.run, slow)
        assert begun.wait(10)
        others = [pool.submit(group.run, write) for write in writes]
        while len(group._waiting) < len(writes):
            assert not any(other.done() for other in others)
        go_on.set()
        assert first.result(10) == "slow"
        return [other.exception(10) or other.result() for other in others]


def roles(ledger):
    with ledger.reading() as conn:
        return set(conn.execute(select(leaders.c.role)).scalars())


def test_those_who_wait_share_a_commit_and_each_has_its_own_answer(ledger, group, commits):
    wanted = [f"writer {number}" for number in range(WRITERS)]
    assert while_one_is_at_work(group, [told_by(role) for role in wanted]) == wanted
    assert {"slow", *wanted} <= roles(ledger)
    assert len(commits) == 2


def test_a_write_that_is_refused_takes_no_other_along_and_leaves_nothing(ledger, group):
    def refused(conn):
        told_by("half")(conn)
        raise LookupError

    came = while_one_is_at_work(group, [told_by("a"), refused, told_by("slow"), told_by("b")])
    assert [*map(type, came)] == [str, LookupError, IntegrityError, str]
    assert {"slow", "a", "b"} <= roles(ledger)
    assert "half" not in roles(ledger)


def test_where_nothing_reaches_the_disk_all_are_told(ledger, group):
    def fail(conn):
        if "a" in conn.execute(select(leaders.c.role)).scalars().all():
            raise OSError("the disk is full")

    event.listen(ledger.engine, "commit", fail)
    came = while_one_is_at_work(group, [told_by("a"), told_by("b")])
    assert [*map(str, came)] == ["the disk is full"] * 2
    assert not {"a", "b"} & roles(ledger)
    event.remove(ledger.engine, "commit", fail)
    assert group.run(told_by("a")) == "a"
