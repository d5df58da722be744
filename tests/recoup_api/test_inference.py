"""The gateway before servers that behave as vLLM does: what reaches them, and what comes back when."""

import json
import threading
import time

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient

from recoup.schemas import JobError, Launch, Lineage
from recoup_api.app import create_app
from recoup_jobs.deployments import Deployments, NewDeployment, Placed, new_id
from recoup_jobs.keys import SCOPES, NewKey, create_key

CHAT = {"model": "support", "messages": [{"role": "user", "content": "Where is my parcel?"}]}
WHY = JobError(code="no_effect", message="none")


class Installation:
    """A service before these servers, whose deployments the test itself places."""

    def __init__(self, settings, ledger, upstreams, **more):
        self.ledger, self.upstreams = ledger, upstreams
        self.urls = [upstream.url for upstream in upstreams]
        self.settings = settings.model_copy(update={"serve_urls": self.urls} | more)
        self.deployments = Deployments(ledger, self.urls)
        self.app = create_app(self.settings, ledger, sweep=False)

    def deploy(self, recovery, name="support", tenant="default", on=None):
        lineage = Lineage(recovery=recovery, student="student", teacher="teacher", outcome="recovered")
        new = NewDeployment(new_id(), tenant, name, "adapter", lineage, Launch(arguments=[], environment={}))
        id = self.deployments.add(new, 10).id
        for upstream in self.upstreams if on is None else on:
            upstream.adapters[id] = 0.5
            self.deployments.place(id, Placed(upstream.url, "ready"))
        self.deployments.move(id, "probing")
        self.deployments.move(id, "live")
        return id


@pytest.fixture
def install(settings, ledger):
    return lambda *upstreams, **more: Installation(settings, ledger, upstreams, **more)


@pytest.fixture
def upstream(start_upstream):
    return start_upstream()


@pytest.fixture
def here(install, upstream, job):
    there = install(upstream)
    there.id = there.deploy(job["id"])
    return there


@pytest.fixture
def gateway(here):
    with TestClient(here.app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def sdk(here, serve, ledger):
    """The openai package, before the service on a port."""
    key = create_key(ledger, NewKey("default", "test", SCOPES))
    with openai.OpenAI(base_url=f"{serve(here.app)}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_the_openai_package_chats_with_a_deployment(sdk, upstream, here):
    answer = sdk.chat.completions.create(**CHAT, temperature=0, max_tokens=5)
    assert (answer.choices[0].message.content, answer.model) == ("so it goes", "support")
    assert answer.usage.completion_tokens == 3
    assert upstream.bodies[0]["model"] == here.id


def test_the_openai_package_streams_a_chat(sdk):
    stream = sdk.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = [*stream]
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert said == ["so", "it", "goes"]
    assert {chunk.model for chunk in chunks} == {"support"}
    assert chunks[-1].usage.completion_tokens == 3


def test_the_openai_package_completes_texts_and_token_ids(sdk, upstream):
    assert sdk.completions.create(model="support", prompt="Once").choices[0].text == "so it goes"
    stream = sdk.completions.create(model="support", prompt=[1, 2, 3], stream=True)
    assert [chunk.choices[0].text for chunk in stream] == ["so", "it", "goes"]
    assert [body["prompt"] for body in upstream.bodies] == ["Once", [1, 2, 3]]


def test_models_are_listed_with_their_lineage(sdk, here, job):
    (model,) = sdk.models.list().data
    assert (model.id, model.owned_by, model.deployment) == ("support", "recoup", here.id)
    assert model.lineage["recovery"] == job["id"]
    assert sdk.models.retrieve("support").id == "support"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("student")


def test_a_server_is_sent_what_was_validated_and_every_setting_by_name(gateway, upstream, here):
    asked = CHAT | {
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}],
            },
            {"role": "user", "content": "Why?", "name": "ann"},
        ],
        "max_tokens": 3,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 2,
        "user": "u-1",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
    }
    assert gateway.post("/v1/chat/completions", json=asked).status_code == 200
    assert upstream.bodies == [
        {
            "model": here.id,
            "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why?"}],
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": ["x"],
            "seed": 7,
            "logprobs": True,
            "top_logprobs": 2,
        }
    ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"chat_template": "{{ 1 }}"}, "unknown_field"),
        ({"chat_template_kwargs": {}}, "unknown_field"),
        ({"prompt_embeds": "AA"}, "unknown_field"),
        ({"tools": []}, "unknown_field"),
        ({"temperature": 2.1}, "invalid_value"),
        ({"temperature": "1"}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": 10**9}, "invalid_value"),
        ({"n": 9}, "invalid_value"),
        ({"top_logprobs": 5}, "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value"),
        ({"stop": ["x"] * 5}, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value"),
        ({"model": ""}, "invalid_value"),
    ],
)
def test_what_is_not_in_the_contract_reaches_no_server(gateway, upstream, change, code):
    refused = gateway.post("/v1/chat/completions", json=CHAT | change)
    told = refused.json()
    assert (refused.status_code, told["code"], told["error"]["code"]) == (422, code, code)
    assert told["error"]["type"] == "invalid_request_error"
    assert upstream.bodies == []


@pytest.mark.parametrize("prompt", [[], [-1], [2**31], ["a"] * 17, [[]], [1, "a"], 7, None])
def test_a_prompt_is_text_or_token_ids(gateway, upstream, prompt):
    refused = gateway.post("/v1/completions", json={"model": "support", "prompt": prompt})
    assert (refused.status_code, upstream.bodies) == (422, [])


@pytest.mark.parametrize("name", ["student", "unknown", "dep_000000000000000000000000"])
def test_only_names_of_live_deployments_are_served(gateway, upstream, name):
    refused = gateway.post("/v1/chat/completions", json=CHAT | {"model": name})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert upstream.bodies == []


def test_another_tenants_model_is_unknown(here, ledger, upstream):
    key = create_key(ledger, NewKey("theirs", "test", SCOPES))
    headers = {"authorization": f"Bearer {key}"}
    with TestClient(here.app, base_url="http://recoup.example", headers=headers) as theirs:
        assert theirs.get("/v1/models").json()["data"] == []
        assert theirs.post("/v1/chat/completions", json=CHAT).status_code == 404
    assert upstream.bodies == []


def test_who_may_read_models_may_ask_them(here, ledger):
    for scopes, status in ((["models:read"], 200), (["models:write"], 403)):
        key = create_key(ledger, NewKey("default", "test", tuple(scopes)))
        headers = {"authorization": f"Bearer {key}"}
        with TestClient(here.app, base_url="http://recoup.example", headers=headers) as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == status


def test_requests_go_to_the_server_that_is_least_busy(install, start_upstream, job, serve):
    servers = [start_upstream(), start_upstream()]
    there = install(*servers)
    there.deploy(job["id"])
    for server in servers:
        server.pause = 0.1
    chat_at_once(serve(there.app), 8)
    assert [len(server.bodies) for server in servers] == [4, 4]


def test_only_servers_on_which_it_was_proven_are_asked(install, start_upstream, job):
    servers = [start_upstream(), start_upstream(), start_upstream()]
    there = install(*servers)
    id = there.deploy(job["id"])
    there.deployments.place(id, Placed(servers[0].url, "refused", WHY))
    there.deployments.place(id, Placed(servers[1].url, "away"))
    with TestClient(there.app, base_url="http://127.0.0.1") as client:
        assert {client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(4)} == {200}
    assert [len(server.bodies) for server in servers] == [0, 0, 4]


@pytest.mark.parametrize("fault", ["stopped", "unloaded", "failing"])
def test_a_server_that_cannot_answer_is_passed_over(install, start_upstream, job, fault):
    broken, sound = start_upstream(), start_upstream()
    there = install(broken, sound)
    there.deploy(job["id"])
    with TestClient(there.app, base_url="http://127.0.0.1") as client:
        if fault == "stopped":
            broken.stop()
        elif fault == "unloaded":
            broken.restart()
        else:
            broken.refusal = 500, {}
        answers = [client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(sound.bodies) == 3


def test_where_no_server_has_the_adapter_nobody_answers_in_its_place(gateway, upstream):
    upstream.restart()
    refused = gateway.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_name_that_passed_on_a_moment_ago_is_followed(gateway, here, upstream, job):
    assert gateway.post("/v1/chat/completions", json=CHAT).status_code == 200
    newer = here.deploy(job["id"])
    del upstream.adapters[here.id]
    assert gateway.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert upstream.bodies[-1]["model"] == newer


def test_what_a_server_says_of_a_request_is_told_under_the_models_name(gateway, upstream, here):
    upstream.refusal = 400, {}
    refused = gateway.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert "not now" in refused.json()["detail"]
    assert here.id not in refused.text


def test_callers_come_back_where_every_server_is_full(install, upstream, job, serve):
    there = install(upstream, max_serving_requests=2)
    there.deploy(job["id"])
    upstream.pause = 0.2
    url = serve(there.app)
    statuses = chat_at_once(url, 6)
    assert sorted(statuses) == [200] * 2 + [429] * 4
    assert upstream.most == 2
    assert chat_at_once(url, 1) == [200]


def test_a_busy_server_is_said_to_be_busy(gateway, upstream):
    upstream.refusal = 429, {}
    refused = gateway.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert refused.headers["retry-after"] == "1"


def test_a_server_that_says_nothing_is_not_waited_for_without_end(install, upstream, job):
    there = install(upstream, answer_seconds=0.2)
    there.deploy(job["id"])
    upstream.pause = 1.0
    with TestClient(there.app, base_url="http://127.0.0.1") as client:
        refused = client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "answer_timeout")
    assert there.app.state.gateway._lines[0].busy == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(here, upstream, serve, stream):
    upstream.pause, upstream.words = 0.05, ["word"] * 200
    url = serve(here.app)
    with (
        httpx2.Client(timeout=0.5) as client,
        pytest.raises((httpx2.ReadTimeout, EOFError)),
        client.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": stream}) as answer,
    ):
        next(answer.iter_raw())
        raise EOFError
    wait_until(lambda: (upstream.running, upstream.broken_off) == (0, 1))
    assert here.app.state.gateway._lines[0].busy == 0


def test_a_stream_that_breaks_off_says_so(here, upstream, serve):
    upstream.pause, upstream.words = 0.05, ["word"] * 50
    here.app.state.gateway._lines[0].http.timeout = httpx2.Timeout(0.2)
    url = serve(here.app)
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        upstream.pause = 1.0
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_unavailable"


def chat_at_once(url, count):
    statuses = []

    def ask():
        statuses.append(httpx2.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).status_code)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return statuses


def wait_until(holds, seconds=10.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
