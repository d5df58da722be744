"""`/v1/deployments`: what may be asked to be served, by whom, and what is said of it."""

import pytest

UNKNOWN = f"rec_{'0' * 24}"


@pytest.fixture
def made(deploying, deployable):
    return deploying.post("/v1/deployments", json={"recovery": deployable, "name": "support"}).json()


def test_a_deployment_is_accepted_and_waits(deploying, deployable):
    answer = deploying.post("/v1/deployments", json={"recovery": deployable, "name": "support"})
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/deployments/{made['id']}")
    assert (made["name"], made["kind"], made["state"]) == ("support", "adapter", "pending")
    lineage = {
        "recovery": deployable,
        "student": "student",
        "teacher": "teacher",
        "outcome": "recovered",
    }
    assert made["lineage"] == lineage
    assert made["launch"]["arguments"][-2:] == ["--max-lora-rank", "8"]
    assert deploying.get(answer.headers["location"]).json() == made


def test_without_a_name_it_is_the_recoverys_id(deploying, deployable):
    assert deploying.post("/v1/deployments", json={"recovery": deployable}).json()["name"] == deployable


def test_a_repeated_request_deploys_once(deploying, deployable):
    key = {"Idempotency-Key": "one"}
    answers = [
        deploying.post("/v1/deployments", json={"recovery": deployable}, headers=key) for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert len(deploying.get("/v1/deployments").json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"recovery": UNKNOWN}, "recovery_not_found"),
        ({"recovery": "rec_1"}, "invalid_value"),
        ({"recovery": UNKNOWN, "name": "A b"}, "invalid_value"),
        ({"recovery": UNKNOWN, "model": "x"}, "unknown_field"),
        ({}, "invalid_value"),
    ],
)
def test_what_cannot_be_deployed_is_refused(deploying, body, code):
    refused = deploying.post("/v1/deployments", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, code)


def test_a_recovery_that_runs_is_not_deployed(deploying, claim):
    refused = deploying.post("/v1/deployments", json={"recovery": claim.job_id}).json()
    assert (refused["code"], refused["errors"][0]["pointer"]) == ("not_finished", "/recovery")


def test_a_recovery_without_weights_is_not_deployed(deploying, finish):
    id = finish({"report.json": "{}"})
    assert deploying.post("/v1/deployments", json={"recovery": id}).json()["code"] == "nothing_to_deploy"


def test_an_adapter_that_vllm_would_not_serve_is_refused(deploying, finished):
    assert deploying.post("/v1/deployments", json={"recovery": finished}).json()["code"] == "no_probe"


def test_an_installation_without_servers_says_so(client, deployable):
    refused = client.post("/v1/deployments", json={"recovery": deployable})
    assert (refused.status_code, refused.json()["code"]) == (409, "no_replicas")


def test_a_deployment_is_withdrawn_and_stays_known(deploying, made):
    path = f"/v1/deployments/{made['id']}"
    assert [deploying.delete(path).json()["state"] for _ in range(2)] == ["withdrawn"] * 2
    assert deploying.get(path).json()["ended_at"] is not None
    assert deploying.get("/v1/deployments", params={"state": "pending"}).json()["data"] == []


def test_a_rollback_needs_something_before(deploying, made):
    refused = deploying.post(f"/v1/deployments/{made['id']}/rollback")
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")


def test_pages_follow_one_another_and_cursors_are_sealed(deploying, deployable):
    for index in range(3):
        deploying.post("/v1/deployments", json={"recovery": deployable, "name": f"n{index}"})
    first = deploying.get("/v1/deployments", params={"limit": 2}).json()
    rest = deploying.get("/v1/deployments", params={"limit": 2, "after": first["next_cursor"]}).json()
    assert [one["name"] for one in first["data"] + rest["data"]] == ["n2", "n1", "n0"]
    forged = deploying.get("/v1/deployments", params={"after": first["data"][0]["id"]})
    assert (forged.status_code, forged.json()["code"]) == (400, "invalid_cursor")


def test_an_id_that_is_none_is_unknown(deploying):
    for id in ("dep_1", f"dep_{'0' * 24}", "%00"):
        assert deploying.get(f"/v1/deployments/{id}").json()["code"] == "deployment_not_found"
