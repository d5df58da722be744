import hashlib
import json
import threading
import time

import pytest

from recoup.schemas import Recovery


def test_a_recovery_is_accepted_and_can_be_read_where_the_answer_points(client, body):
    accepted = client.post("/v1/recoveries", json=body)
    assert accepted.status_code == 202
    location = accepted.headers["location"]
    assert client.get(location).json() == accepted.json()
    assert Recovery.model_validate(accepted.json()).state == "queued"


def test_every_default_is_in_the_answer(job):
    assert job["request"]["training"]["lora"] == {
        "rank": 16,
        "alpha": 32,
        "targets": "auto",
        "allocation": "uniform",
    }


def test_recoveries_are_listed_newest_first_in_pages(client, body):
    created = [client.post("/v1/recoveries", json=body).json()["id"] for _ in range(3)]
    first = client.get("/v1/recoveries", params={"limit": 2}).json()
    rest = client.get("/v1/recoveries", params={"limit": 2, "after": first["next_cursor"]}).json()
    assert [job["id"] for job in first["data"] + rest["data"]] == created[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_a_list_can_be_of_one_state(client, claim):
    assert len(client.get("/v1/recoveries", params={"state": "running"}).json()["data"]) == 1
    assert client.get("/v1/recoveries", params={"state": "queued"}).json()["data"] == []


def test_an_unchanged_recovery_is_not_sent_twice(client, ledger, job):
    url = f"/v1/recoveries/{job['id']}"
    etag = client.get(url).headers["etag"]
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    ledger.cancel(job["id"])
    assert client.get(url, headers={"if-none-match": etag}).json()["state"] == "cancelled"


def test_a_long_poll_answers_at_the_change_and_not_at_its_end(client, ledger, claim):
    later = threading.Timer(0.3, ledger.enter_stage, (claim, "diagnose"))
    later.start()
    began = time.monotonic()
    seen = client.get(f"/v1/recoveries/{claim.job_id}", params={"wait": 30}).json()
    later.join()
    assert seen["stage"] == "diagnose"
    assert time.monotonic() - began < 5


def test_a_long_poll_that_sees_no_change_says_so(client, job):
    url = f"/v1/recoveries/{job['id']}"
    seen = client.get(url, params={"wait": 0.3}, headers={"if-none-match": '"1"'})
    assert (seen.status_code, seen.content) == (304, b"")


def test_a_long_poll_does_not_wait_for_what_has_ended(client, finished):
    began = time.monotonic()
    assert client.get(f"/v1/recoveries/{finished}", params={"wait": 30}).json()["state"] == "succeeded"
    assert time.monotonic() - began < 5


def test_cancelling_is_final(client, job):
    url = f"/v1/recoveries/{job['id']}/cancel"
    assert client.post(url).json()["state"] == "cancelled"
    again = client.post(url)
    assert (again.status_code, again.json()["code"]) == (409, "job_terminal")


def test_cancelling_a_running_recovery_twice_is_the_same_answer(client, claim):
    url = f"/v1/recoveries/{claim.job_id}/cancel"
    assert client.post(url).json() == client.post(url).json()


def test_events_come_in_order_and_in_pages(client, claim):
    url = f"/v1/recoveries/{claim.job_id}/events"
    first = client.get(url, params={"limit": 1}).json()
    rest = client.get(url, params={"after": first["next_cursor"]}).json()
    assert [event["data"]["state"] for event in first["data"] + rest["data"]] == ["queued", "running"]


@pytest.mark.parametrize("part", ["report", "alignment", "recipe", "artifacts", "artifacts/report.json"])
def test_what_is_not_there_yet_is_a_conflict_that_names_the_state(client, claim, part):
    refused = client.get(f"/v1/recoveries/{claim.job_id}/{part}")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_finished")
    assert "running" in refused.json()["detail"]


@pytest.mark.parametrize("part", ["report", "alignment", "recipe", "artifacts", "artifacts/report.json"])
def test_a_recovery_that_ended_without_artifacts_has_none(client, job, part):
    client.post(f"/v1/recoveries/{job['id']}/cancel")
    refused = client.get(f"/v1/recoveries/{job['id']}/{part}")
    assert (refused.status_code, refused.json()["code"]) == (404, "no_artifacts")


def test_the_report_is_json_for_programs(client, finished):
    answer = client.get(f"/v1/recoveries/{finished}/report")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["object"] == "recovery.report"


def test_the_report_is_a_page_for_browsers(client, finished):
    accept = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    answer = client.get(f"/v1/recoveries/{finished}/report", headers=accept)
    assert answer.headers["content-type"].startswith("text/html")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.text.startswith("<!doctype html>")


def test_the_alignment_is_the_reports(client, finished):
    report = client.get(f"/v1/recoveries/{finished}/report").json()
    assert client.get(f"/v1/recoveries/{finished}/alignment").json() == report["alignment"]


@pytest.mark.parametrize("kind", ["text/csv", "image/svg+xml", "image/png"])
def test_the_alignment_comes_as_a_table_or_a_picture(client, finished, kind):
    answer = client.get(f"/v1/recoveries/{finished}/alignment", headers={"accept": kind})
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["vary"] == "Accept"


def test_the_recipe_is_python(client, finished):
    answer = client.get(f"/v1/recoveries/{finished}/recipe")
    assert answer.headers["content-type"] == "text/x-python; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"]
    assert answer.text == 'print("β")\n'


@pytest.mark.parametrize(
    ("outcome", "method", "why"),
    [
        ("not_needed", "none", "as close to its teacher as rounding allows"),
        ("partial", "spectral", "spectral, changes weights without training"),
    ],
)
def test_where_nothing_was_trained_there_is_no_recipe(client, finish, outcome, method, why):
    plan = [{"name": "method", "value": method, "why": "as requested"}]
    id = finish({"report.json": json.dumps({"outcome": outcome, "plan": plan, "training": None})})
    refused = client.get(f"/v1/recoveries/{id}/recipe")
    assert (refused.status_code, refused.json()["code"]) == (404, "no_recipe")
    assert why in refused.json()["detail"]


def test_an_artifact_is_what_the_manifest_says(client, finished):
    listed = client.get(f"/v1/recoveries/{finished}/artifacts").json()["data"]
    paths = {"report.json", "report.html", "recipe.py", "adapter/adapter_config.json"}
    paths |= {f"alignment.{suffix}" for suffix in ("json", "csv", "svg", "png")}
    assert {file["path"] for file in listed} == paths
    for file in listed:
        content = client.get(f"/v1/recoveries/{finished}/artifacts/{file['path']}").content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])


def test_a_part_of_an_artifact_can_be_asked_for(client, finished):
    url = f"/v1/recoveries/{finished}/artifacts/report.html"
    part = client.get(url, headers={"range": "bytes=2-8"})
    assert (part.status_code, part.content) == (206, b"doctype")


@pytest.mark.parametrize("artifact_store", ["bucket"], indirect=True)
def test_a_store_of_artifacts_that_is_away_is_told_as_such(client, finished, settings):
    away = settings.model_copy(update={"artifacts_endpoint": "http://127.0.0.1:9"})
    client.app.state.settings = away
    answer = client.get(f"/v1/recoveries/{finished}/artifacts/report.html")
    assert (answer.status_code, answer.json()["code"]) == (503, "artifacts_unavailable")
    assert "127.0.0.1" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "path", ["manifest.json", "..%2f..%2f..%2fledger.db", "%2fetc%2fpasswd", "adapter", "x%00.json"]
)
def test_nothing_but_artifacts_can_be_fetched(client, finished, path):
    assert client.get(f"/v1/recoveries/{finished}/artifacts/{path}").status_code == 404


@pytest.mark.parametrize("id", ["rec_000000000000000000000000", "rec_%00", "%ff%fe", "..%2f..%2fetc"])
def test_an_unknown_job_is_not_found(client, id):
    assert client.get(f"/v1/recoveries/{id}").status_code == 404
    assert client.post(f"/v1/recoveries/{id}/cancel").status_code == 404


def test_a_cursor_is_good_for_the_list_that_gave_it_and_for_no_other(client, body):
    for _ in range(2):
        client.post("/v1/recoveries", json=body)
    cursor = client.get("/v1/recoveries", params={"limit": 1}).json()["next_cursor"]
    assert len(client.get("/v1/recoveries", params={"after": cursor}).json()["data"]) == 1
    wrong = ({"after": cursor, "state": "queued"}, {"after": f"A{cursor[1:]}"}, {"after": cursor[:-2]})
    for changed in wrong:
        refused = client.get("/v1/recoveries", params=changed)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor")


def test_a_paused_recovery_goes_on_when_it_is_resumed(client, job):
    url = f"/v1/recoveries/{job['id']}"
    assert client.post(f"{url}/pause").json()["state"] == "paused"
    assert client.post(f"{url}/resume").json()["state"] == "queued"


@pytest.mark.parametrize("verb", ["resume", "retry"])
def test_a_verb_out_of_place_is_a_conflict_that_names_the_state(client, job, verb):
    refused = client.post(f"/v1/recoveries/{job['id']}/{verb}")
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")
    assert "the recovery is queued" in refused.json()["detail"]


def test_a_retry_is_accepted_as_a_new_recovery(client, job):
    client.post(f"/v1/recoveries/{job['id']}/cancel")
    again = client.post(f"/v1/recoveries/{job['id']}/retry")
    assert (again.status_code, again.json()["retry_of"]) == (202, job["id"])
    assert client.get(again.headers["location"]).json() == again.json()


def test_priority_and_metadata_can_change(client, job):
    url = f"/v1/recoveries/{job['id']}"
    changed = client.patch(url, json={"priority": 3, "metadata": {"team": "a"}})
    assert (changed.json()["request"]["priority"], changed.json()["request"]["metadata"]) == (
        3,
        {"team": "a"},
    )
    assert changed.headers["etag"] == client.get(url).headers["etag"] != f'"{job["version"]}"'


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"seed": 1}, "/seed"),
        ({"priority": 101}, "/priority"),
        ({"priority": "1"}, "/priority"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
    ],
)
def test_nothing_else_can_change(client, job, changes, pointer):
    refused = client.patch(f"/v1/recoveries/{job['id']}", json=changes)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("state=queued", [2, 1, 0]),
        ("state=failed", []),
        ("outcome=recovered", []),
        ("damage=pruning", [1]),
        ("metadata[team]=red", [1, 0]),
        ("metadata%5Bteam%5D=red&metadata[run]=2", [1]),
        ("metadata[team]=red&damage=finetuning", []),
        ("metadata[]", None),
        ("metadata[team]=red&metadata[team]=red", None),
        ("metadata[%00]=red", None),
        ("metadata[a]=" + "x" * 513, None),
        ("&".join(f"metadata[{n}]=x" for n in range(17)), None),
        ("metadata=red", None),
        ("damage=rust", None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_list_is_of_what_is_asked_for(client, body, query, found):
    pairs = [{"team": "red"}, {"team": "red", "run": "2"}, {"team": "blue"}]
    damages = ["auto", "pruning", "auto"]
    for damage, metadata in zip(damages, pairs, strict=True):
        client.post("/v1/recoveries", json=body | {"damage": damage, "metadata": metadata})
    answer = client.get(f"/v1/recoveries?{query}")
    if found is None:
        assert (answer.status_code, answer.json()["errors"][0]["pointer"][:7]) == (422, "/query/")
    else:
        shown = [job["request"]["metadata"] for job in answer.json()["data"]]
        assert shown == [pairs[at] for at in found]


def test_a_cursor_is_of_its_filter_alone(client, body):
    for _ in range(2):
        client.post("/v1/recoveries", json=body | {"metadata": {"team": "red"}})
    page = client.get("/v1/recoveries?metadata[team]=red&limit=1").json()
    url = f"/v1/recoveries?after={page['next_cursor']}&limit=1"
    assert client.get(f"{url}&metadata[team]=red").status_code == 200
    assert client.get(f"{url}&metadata[team]=blue").json()["code"] == "invalid_cursor"
    assert client.get(url).json()["code"] == "invalid_cursor"


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", None])
@pytest.mark.parametrize("known", ['"7"', 'W/"1"', "text", '"1", "2"'])
def test_what_has_changed_since_is_not_steered(client, job, verb, known):
    url = f"/v1/recoveries/{job['id']}"
    headers = {"if-match": known}
    if verb:
        refused = client.post(f"{url}/{verb}", headers=headers)
    else:
        refused = client.patch(url, json={"priority": 1}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
    assert client.get(url).json()["version"] == job["version"]


@pytest.mark.parametrize("known", ['"{version}"', "*"])
def test_what_has_not_changed_is(client, job, known):
    headers = {"if-match": known.format(version=job["version"])}
    assert client.post(f"/v1/recoveries/{job['id']}/pause", headers=headers).json()["state"] == "paused"


def test_a_retry_with_one_key_makes_one_job(client, ledger, job):
    client.post(f"/v1/recoveries/{job['id']}/cancel")
    answers = [
        client.post(f"/v1/recoveries/{job['id']}/retry", headers={"idempotency-key": "again"})
        for _ in range(2)
    ]
    assert answers[0].content == answers[1].content
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert answers[0].json()["retry_of"] == job["id"]
    assert len(ledger.list(None, 10).data) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"if-none-match": '"1"'},
        {"if-none-match": '"2", W/"1"'},
        {"if-none-match": "x" * 300},
        {"if-none-match": "x" * 1001},
        {"if-none-match": '"1"' + " " * 700},
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [True, False])
def test_the_short_way_to_read_answers_as_the_documented_one(client, job, headers, known):
    url = f"/v1/recoveries/{job['id'] if known else 'rec_' + '0' * 24}"
    short, documented = (client.get(url + query, headers=headers) for query in ("", "?wait=0"))
    assert short.status_code == documented.status_code
    assert as_told(short) == as_told(documented)


@pytest.mark.parametrize(
    ("change", "headers"),
    [
        ({}, {}),
        ({}, {"idempotency-key": "x" * 300}),
        ({}, {"content-type": "text/plain"}),
        ({"foo": 1}, {}),
        ({"student": {"source": "nowhere"}}, {}),
    ],
)
def test_the_short_way_to_create_answers_as_the_documented_one(client, body, change, headers):
    sent = {"json": body | change, "headers": {"content-type": "application/json"} | headers}
    short, documented = (client.post(f"/v1/recoveries{query}", **sent) for query in ("", "?dry_run=false"))
    assert short.status_code == documented.status_code
    assert as_told(short) == as_told(documented)


def as_told(answer):
    """Headers and body, without what is of this one answer alone."""
    own = {"x-request-id", "location", "content-length", "ratelimit"}
    headers = {name: value for name, value in answer.headers.items() if name not in own}
    body = answer.json() if answer.content else {}
    return headers, {
        name: value for name, value in body.items() if name not in {"id", "created_at", "request_id"}
    }
