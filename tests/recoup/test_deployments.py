"""`client.deployments` and its commands, against a server that answers in turn."""

import json

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from recoup import DeploymentFailedError, InvalidArgumentError, NotFoundError, WaitTimeoutError, _follow
from recoup._commands import app

RECOVERY = f"rec_{'1' * 24}"
WHY = {"code": "no_effect", "message": "0 nats a token is all that it changes."}
LINEAGE = {"recovery": RECOVERY, "student": "s", "teacher": "t", "outcome": "recovered"}


def row(state, **more):
    nothing = dict.fromkeys(("reason", "live_at", "ended_at"))
    fixed = {"id": "dep_1", "object": "deployment", "name": "support", "kind": "adapter", "lineage": LINEAGE}
    launch = {"arguments": ["s"], "environment": {}}
    standing = {"state": state, "replicas": [], "launch": launch, "version": 1, "created_at": 0.0}
    return json.dumps(fixed | nothing | standing | more).encode()


@pytest.fixture
def answer(service, monkeypatch):
    """Sets what the server answers, one after another."""
    monkeypatch.setattr(_follow, "LOOK", 0.01)
    return lambda *bodies: service.deployments.extend((200, body) for body in bodies)


@pytest.fixture
def run(service, monkeypatch):
    monkeypatch.setenv("RECOUP_BASE_URL", service.url)
    return lambda *words, **more: CliRunner().invoke(app, [*words], **more)


def test_only_what_was_given_is_sent_and_a_key_with_it(client, service, answer):
    answer(row("pending"), row("pending"))
    assert client.deployments.create(RECOVERY).state == "pending"
    client.deployments.create(RECOVERY, name="support", idempotency_key="k")
    first, second = service.sent("POST", "/v1/deployments")
    assert json.loads(first.body) == {"recovery": RECOVERY}
    assert json.loads(second.body) == {"recovery": RECOVERY, "name": "support"}
    assert second.headers["Idempotency-Key"] == "k"


@pytest.mark.parametrize("given", [{"recovery": "x"}, {"recovery": RECOVERY, "name": "A b"}])
def test_what_cannot_be_is_refused_before_anything_is_sent(client, service, given):
    with pytest.raises(ValidationError):
        client.deployments.create(**given)
    with pytest.raises(InvalidArgumentError):
        client.deployments.get("../files")
    assert service.seen == []


def test_waiting_ends_where_it_is_live(client, answer):
    answer(row("pending"), row("probing"), row("live"))
    assert client.deployments.wait("dep_1").state == "live"


def test_a_deployment_that_failed_raises_its_reason(client, answer):
    answer(row("probing"), row("failed", reason=WHY))
    with pytest.raises(DeploymentFailedError, match=r"Deployment dep_1 is failed: 0 nats.*\(no_effect\)"):
        client.deployments.wait("dep_1")
    answer(row("withdrawn"))
    with pytest.raises(DeploymentFailedError, match="took it out of service"):
        client.deployments.wait("dep_1")


def test_patience_has_an_end(client, answer):
    answer(row("pending"))
    with pytest.raises(WaitTimeoutError, match="Deployment dep_1 is still pending"):
        client.deployments.wait("dep_1", timeout=0)


def test_verbs_go_to_their_routes(client, service, answer):
    page = {"object": "list", "data": [json.loads(row("live"))], "has_more": False, "next_cursor": None}
    answer(row("withdrawn"), row("pending"), json.dumps(page).encode())
    assert client.deployments.delete("dep_1").state == "withdrawn"
    assert client.deployments.rollback("dep_1").state == "pending"
    assert [one.state for one in client.deployments.list(state="live")] == ["live"]
    sent = [(request.method, request.path) for request in service.seen]
    assert sent == [
        ("DELETE", "/v1/deployments/dep_1"),
        ("POST", "/v1/deployments/dep_1/rollback"),
        ("GET", "/v1/deployments"),
    ]
    assert service.seen[-1].query == {"state": "live"}


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def test_a_chat_is_one_answer(client, service, answer):
    answer(said("Paris."))
    question = [{"role": "user", "content": "capital?"}]
    assert client.deployments.chat("support", question, max_tokens=9) == "Paris."
    (sent,) = service.sent("POST", "/v1/chat/completions")
    assert json.loads(sent.body) == {
        "model": "support",
        "messages": question,
        "max_tokens": 9,
        "temperature": 0,
    }


def test_deploy_waits_and_says_how_to_ask(run, answer):
    answer(row("pending"), row("probing"), row("live"))
    result = run("deploy", RECOVERY, "--name", "support")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"dep_1 live: support, of {RECOVERY}")
    assert "recoup chat support" in result.stdout


def test_deploy_says_meanwhile_what_a_whole_model_waits_for(run, answer):
    why = {"code": "replicas_away", "message": "No server that could serve this answers."}
    launch = {"arguments": ["deployments/dep_1", "--served-model-name", "dep_1"], "environment": {}}
    waits = row("pending", kind="model", launch=launch, reason=why)
    answer(row("pending", kind="model", launch=launch), waits, waits, row("live", kind="model"))
    result = run("deploy", RECOVERY)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("No server that could serve this answers.") == 1
    assert "recoup-server teacher --model <RECOUP_HOME>/deployments/dep_1" in result.stderr
    assert result.stdout.startswith("dep_1 live")


def test_deploy_ends_badly_where_the_probe_does(run, answer):
    answer(row("pending"), row("failed", reason=WHY))
    result = run("deploy", RECOVERY)
    assert (result.exit_code, "no_effect" in result.stderr) == (1, True)


def test_a_conversation_is_kept_line_by_line(run, service, answer):
    answer(said("Hello."), said("Paris."))
    result = run("chat", "support", input="hi\n\ncapital?\n")
    assert (result.exit_code, result.stdout) == (0, "Hello.\nParis.\n")
    last = json.loads(service.sent("POST", "/v1/chat/completions")[-1].body)["messages"]
    assert [turn["content"] for turn in last] == ["hi", "Hello.", "capital?"]


def test_other_commands_show_what_became_of_it(run, answer):
    answer(row("withdrawn"), row("pending"))
    assert run("undeploy", "dep_1").stdout.startswith("dep_1 withdrawn")
    assert json.loads(run("rollback", "dep_1", "--json").stdout)["state"] == "pending"
    page = {"object": "list", "data": [json.loads(row("live"))], "has_more": False, "next_cursor": None}
    answer(json.dumps(page).encode())
    assert "support" in run("deployments").stdout


def test_an_unknown_model_is_told_with_what_to_do(run, service, client):
    problem = {"type": "x", "title": "Not Found", "status": 404, "detail": "no deployment of this name"}
    body = json.dumps(problem | {"code": "model_not_found", "request_id": "r", "errors": []}).encode()
    service.deployments.append((404, body))
    result = run("chat", "nobody", "hi")
    assert (result.exit_code, "recoup deployments" in result.stderr) == (2, True)
    service.deployments.append((404, body))
    with pytest.raises(NotFoundError):
        client.deployments.chat("nobody", [])
