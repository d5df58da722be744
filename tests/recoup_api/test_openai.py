"""The unchanged `openai` package against a running server: upload, create, follow, cancel."""

import asyncio
import json

import openai
import pytest

from recoup_api.app import create_app
from recoup_jobs.keys import NewKey, create_key
from recoup_jobs.settings import Alias

ROWS = "\n".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
    )
    for n in range(60)
).encode()
HELD_OUT = b"\n".join(ROWS.splitlines()[:20])
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}}


@pytest.fixture
def address(serve, settings, ledger, body):
    aliases = {"gpt-4o-mini": Alias(student="student", teacher="teacher", method="off_policy")}
    app = create_app(settings.model_copy(update={"aliases": aliases}), ledger)
    return {"base_url": f"{serve(app)}/v1", "api_key": create_key(ledger, NewKey("ours", "openai"))}


@pytest.fixture
def client(address):
    with openai.OpenAI(**address, max_retries=0) as client:
        yield client


@pytest.fixture
def file(client):
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")


def test_files_are_openais(client, file):
    assert (file.object, file.purpose, file.status, file.bytes) == (
        "file",
        "fine-tune",
        "processed",
        len(ROWS),
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    second = client.files.create(file=("b.jsonl", ROWS), purpose="other")
    assert [found.id for found in client.files.list(limit=1)] == [second.id, file.id]
    assert [found.id for found in client.files.list(order="asc", limit=1)] == [file.id, second.id]
    assert [found.id for found in client.files.list(purpose="other")] == [second.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        client.files.retrieve(file.id)
    assert missing.value.code == "file_not_found"


def test_a_supervised_job_teaches_a_healthy_model_the_demonstrations(client, ledger, file):
    job = client.fine_tuning.jobs.create(
        model="student",
        training_file=file.id,
        method=SUPERVISED,
        suffix="My Tone",
        metadata={"k": "v"},
        seed=7,
    )
    assert (job.object, job.status, job.model, job.training_file) == (
        "fine_tuning.job",
        "queued",
        "student",
        file.id,
    )
    assert (job.seed, job.metadata, job.fine_tuned_model) == (7, {"k": "v"}, None)
    asked = ledger.get(job.id).request
    assert (asked.teach.file, asked.teach.held_out, asked.teach.rehearse) == (file.id, None, True)
    assert (asked.method.type, asked.teacher.source, asked.output.name) == ("auto", "student", "my-tone")
    assert (asked.training.steps, asked.training.batch_size) == (30, 4)


def test_a_validation_file_is_held_out(client, ledger, file):
    beside = client.files.create(file=("held-out.jsonl", HELD_OUT), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="student", training_file=file.id, validation_file=beside.id, method=SUPERVISED
    )
    assert (job.training_file, job.validation_file) == (file.id, beside.id)
    asked = ledger.get(job.id).request
    assert (asked.teach.file, asked.teach.held_out) == (file.id, beside.id)
    assert asked.prompts.builtin == "general"


def test_a_taught_model_is_named_and_its_checkpoints_tell_the_loss_on_what_is_held_out(client, ledger, file):
    job = client.fine_tuning.jobs.create(model="student", training_file=file.id, method=SUPERVISED)
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    ledger.event(claim, "metric", {"name": "validation", "step": 8, "kl": 0.05, "skill_loss": 1.5})
    ledger.succeed(claim, "taught_with_forgetting")
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == f"recovery:{job.id}"
    (point,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert point.metrics.valid_loss == 1.5


def test_an_alias_names_teacher_and_method(client, ledger, file):
    job = client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
    asked = ledger.get(job.id).request
    assert (asked.student.source, asked.teacher.source, asked.method.type) == (
        "student",
        "teacher",
        "off_policy",
    )
    assert client.fine_tuning.jobs.retrieve(job.id).model == "gpt-4o-mini"


def test_metadata_names_teacher_and_method(client, ledger, file):
    named = {"teacher": "teacher", "method": "two_stage"}
    job = client.fine_tuning.jobs.create(model="student", training_file=file.id, metadata=named)
    asked = ledger.get(job.id).request
    assert (asked.teacher.source, asked.method.type) == ("teacher", "two_stage")


def test_a_job_is_followed_to_its_end(client, ledger, file):
    job = client.fine_tuning.jobs.create(model="student", training_file=file.id)
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    for step in (10, 20, 30):
        ledger.event(claim, "metric", {"name": "validation", "step": step, "kl": 1 / step})
    ledger.succeed(claim, "recovered")
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", f"recovery:{job.id}")
    assert done.finished_at >= done.created_at
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.type for event in events] == ["message", *["metrics"] * 3, "message", "message"]
    assert "succeeded" in events[0].message
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [point.step_number for point in checkpoints] == [30, 20, 10]
    assert checkpoints[0].metrics.valid_loss == pytest.approx(1 / 30)


def test_a_job_is_paused_and_goes_on(client, ledger, file):
    job = client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
    assert client.fine_tuning.jobs.pause(job.id).status == "queued"
    assert ledger.get(job.id).state == "paused" and ledger.due(60) == []
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert ledger.get(job.id).state == "queued"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.resume(job.id)


def test_jobs_are_listed_by_their_metadata(client, file):
    red, _ = (
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id, metadata={"team": team})
        for team in ("red", "blue")
    )
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "red"})] == [red.id]


def test_a_job_is_cancelled_and_listed(client, file):
    jobs = [client.fine_tuning.jobs.create(model="student", training_file=file.id).id for _ in range(3)]
    assert client.fine_tuning.jobs.cancel(jobs[0]).status == "cancelled"
    listed = list(client.fine_tuning.jobs.list(limit=2))
    assert [job.id for job in listed] == jobs[::-1]
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.cancel(jobs[0])
    assert refused.value.code == "job_terminal"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "nowhere"}, "model", "model_not_found"),
        ({"model": "../etc"}, "model", "invalid_model_ref"),
        ({"training_file": "file-" + "0" * 24}, "training_file", "file_not_found"),
        ({"validation_file": "file-" + "0" * 24}, "validation_file", "file_not_found"),
        ({"method": {"type": "dpo"}}, "method.type", "invalid_value"),
        ({"metadata": {"method": "magic"}}, "metadata.method", "invalid_value"),
        ({"metadata": {"teacher": "nobody"}}, "metadata.teacher", "model_not_found"),
        ({"metadata": {"method": "off_policy"}}, "metadata.method", "unsupported_request"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "invalid_value"),
    ],
)
def test_what_cannot_be_is_told_in_openais_words(client, file, change, param, code):
    asked = {"model": "student", "training_file": file.id} | change
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.fine_tuning.jobs.create(**asked)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (b'{"messages": [{"role": "user", "content": "?"}]}\n' * 60, "missing_reference"),
        (ROWS[: ROWS.index(b"\n")], "too_few_prompts"),
    ],
)
def test_a_training_file_that_shows_nothing_is_told_in_openais_words(client, rows, code):
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.fine_tuning.jobs.create(model="student", training_file=file.id)
    assert (refused.value.param, refused.value.code) == ("training_file", code)


def test_a_file_cannot_train_and_decide(client, file):
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.fine_tuning.jobs.create(model="student", training_file=file.id, validation_file=file.id)
    assert refused.value.param == "validation_file"


def test_a_wrong_key_is_told_in_openais_words(address):
    wrong = openai.OpenAI(**address | {"api_key": "sk-wrong"})
    with wrong as client, pytest.raises(openai.AuthenticationError) as refused:
        client.files.list()
    assert refused.value.code == "unauthorized"


def test_the_asynchronous_client_does_the_same(address):
    async def journey():
        async with openai.AsyncOpenAI(**address) as client:
            file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model="student", training_file=file.id)
            events = [event async for event in client.fine_tuning.jobs.list_events(job.id)]
            await client.fine_tuning.jobs.cancel(job.id)
            return (await client.fine_tuning.jobs.retrieve(job.id)).status, events

    status, events = asyncio.run(journey())
    assert (status, len(events)) == ("cancelled", 1)
