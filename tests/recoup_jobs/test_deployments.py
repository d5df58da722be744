"""What is wanted in service: whose it is, which steps there are, and who has a name."""

import pytest

from recoup.schemas import JobError, Launch, Lineage
from recoup_jobs.deployments import Deployments, NewDeployment, Placed, new_id
from recoup_jobs.errors import BadRequest, Conflict, NotFound, TooMany

REPLICAS = ["http://one", "http://two"]
WHY = JobError(code="no_effect", message="it does nothing")

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def deployments(ledger):
    return Deployments(ledger, REPLICAS)


@pytest.fixture
def add(ledger, deployments, asked):
    """Adds a deployment of a new recovery."""

    def make(name="support", tenant="ours", most=10):
        lineage = Lineage(
            recovery=ledger.create(asked, "gpu.cpu", tenant).id,
            student="student",
            teacher="teacher",
            outcome="recovered",
        )
        launch = Launch(arguments=["student"], environment={})
        return deployments.add(NewDeployment(new_id(), tenant, name, "adapter", lineage, launch), most)

    return make


@pytest.fixture
def make_live(add, deployments):
    def make(name="support"):
        id = add(name).id
        deployments.move(id, "probing")
        deployments.move(id, "live")
        return id

    return make


def states(deployments, *ids):
    return [deployments.get(id, "ours").state for id in ids]


def test_a_new_deployment_is_wanted_and_nowhere(add, deployments):
    made = add()
    assert (made.state, made.replicas, made.version) == ("pending", [], 1)
    assert [one.id for one in deployments.wanted()] == [made.id]
    assert deployments.serving("ours") == []


def test_the_newest_live_deployment_has_the_name(make_live, deployments):
    old, new = make_live(), make_live()
    assert states(deployments, old, new) == ["superseded", "live"]
    assert [one.id for one in deployments.serving("ours")] == [new]
    assert deployments.get(old, "ours").ended_at is not None


def test_other_names_are_not_touched(make_live, deployments):
    make_live("support"), make_live("sales")
    assert [one.name for one in deployments.serving("ours")] == ["sales", "support"]


def test_a_rollback_brings_the_one_before_back_without_a_gap(make_live, deployments):
    first, second, third = make_live(), make_live(), make_live()
    assert deployments.roll_back(third, "ours").id == second
    assert states(deployments, first, second, third) == ["superseded", "pending", "live"]
    deployments.move(second, "probing")
    deployments.move(second, "live")
    assert states(deployments, first, second, third) == ["superseded", "live", "superseded"]
    assert deployments.roll_back(second, "ours").id == first


def test_there_is_nothing_before_the_first(make_live, add, deployments):
    with pytest.raises(Conflict, match="no earlier"):
        deployments.roll_back(make_live(), "ours")
    with pytest.raises(Conflict, match="is pending"):
        deployments.roll_back(add("other").id, "ours")


def test_withdrawing_twice_is_withdrawing_once(make_live, deployments):
    id = make_live()
    once, twice = (deployments.withdraw(id, "ours") for _ in range(2))
    assert once == twice
    assert (once.state, deployments.wanted()) == ("withdrawn", [])


def test_what_was_withdrawn_meanwhile_does_not_come_alive(add, deployments):
    id = add().id
    deployments.move(id, "probing")
    deployments.withdraw(id, "ours")
    deployments.move(id, "live")
    assert states(deployments, id) == ["withdrawn"]


def test_a_failure_says_why(add, deployments):
    id = add().id
    deployments.move(id, "failed", WHY)
    found = deployments.get(id, "ours")
    assert (found.state, found.reason, found.ended_at is None) == ("failed", WHY, False)


def test_what_a_server_does_is_noted_once_for_each(add, deployments):
    id = add().id
    deployments.place(id, Placed(REPLICAS[1], "away"))
    deployments.place(id, Placed(REPLICAS[0], "refused", WHY))
    deployments.place(id, Placed(REPLICAS[1], "ready"))
    deployments.place(id, Placed("http://no-longer-there", "ready"))
    found = deployments.get(id, "ours").replicas
    assert [(one.replica, one.state, one.reason) for one in found] == [
        (0, "refused", WHY),
        (1, "ready", None),
    ]


def test_what_ended_is_cleared_from_the_servers_that_have_it(add, deployments):
    id = add().id
    deployments.place(id, Placed(REPLICAS[0], "ready"))
    assert deployments.ended(0) == []
    deployments.withdraw(id, "ours")
    assert (deployments.ended(-1), deployments.ended(60)) == ([(id, REPLICAS[0])], [])
    deployments.remove(id, REPLICAS[0])
    assert deployments.ended(-1) == []


def test_another_tenant_sees_none_of_it(add, make_live, deployments):
    id = make_live()
    assert deployments.serving("theirs") == []
    assert deployments.find("theirs", None, 10).data == []
    for ask in (deployments.get, deployments.withdraw, deployments.roll_back):
        with pytest.raises(NotFound, match="no deployment"):
            ask(id, "theirs")
    with pytest.raises(BadRequest, match="next_cursor"):
        deployments.find("theirs", id, 10)
    assert states(deployments, id) == ["live"]
    assert make_live() != id


def test_a_list_is_paged_and_filtered(add, make_live, deployments):
    ids = [add(f"n{index}").id for index in range(3)] + [make_live("live")]
    first = deployments.find("ours", None, 2)
    rest = deployments.find("ours", first.next_cursor, 2)
    assert [one.id for one in (*first.data, *rest.data)] == ids[::-1]
    assert (first.has_more, rest.has_more) == (True, False)
    assert [one.id for one in deployments.find("ours", None, 10, "live").data] == ids[3:]


def test_a_tenant_has_so_many_in_service(add, deployments):
    id = add(most=1).id
    with pytest.raises(TooMany, match="withdraw one"):
        add(most=1)
    add(tenant="theirs", most=1)
    deployments.withdraw(id, "ours")
    add(most=1)
