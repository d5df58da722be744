"""The service in this process, with a client, tiny models and a worker that is the test itself."""

import contextlib
import json
import socket
import threading
import time

import numpy
import pytest
import uvicorn
from fastapi.testclient import TestClient
from safetensors.numpy import save, save_file

from recoup_api.app import create_app
from recoup_api.limit import LONGEST_HEAD
from recoup_jobs.artifacts import publish
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store

REPORT = {
    "object": "recovery.report",
    "outcome": "recovered",
    "plan": [{"name": "method", "value": "off_policy", "why": "as requested"}],
    "training": {"steps": 24},
    "alignment": {"positions": 4096, "ceiling": [0.99, None]},
}
SCRIPT = 'print("β")\n'


@pytest.fixture
def artifact_store(request):
    """The settings of where artifacts lie: a folder or, where a test asks for it, a bucket."""
    return request.getfixturevalue("bucket") if getattr(request, "param", "folder") == "bucket" else {}


@pytest.fixture
def settings(tmp_path, database, artifact_store):
    return Settings(home=tmp_path / "home", database_url=database, sweep_seconds=0.02, **artifact_store)


@pytest.fixture
def client(settings, ledger):
    with TestClient(create_app(settings, ledger), base_url="http://127.0.0.1") as client:
        yield client


@contextlib.contextmanager
def serving(app):
    """The application on a port of this machine; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=1, h11_max_incomplete_event_size=LONGEST_HEAD
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def serve():
    """Serves an application on this machine for as long as the test runs."""
    with contextlib.ExitStack() as running:
        yield lambda app: running.enter_context(serving(app))


@pytest.fixture
def write_model(settings):
    """Writes a model folder that preflight accepts."""

    def write(name, tokens=("a", "b", "c"), **config):
        folder = settings.model_roots[0] / name
        folder.mkdir(parents=True)
        llama = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": len(tokens)}
        vocabulary = {token: id for id, token in enumerate(tokens)}
        (folder / "config.json").write_text(json.dumps(llama | config))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        save_file({"w": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def body(write_model):
    """A request that is accepted."""
    write_model("teacher")
    write_model("student")
    return {"student": {"source": "student"}, "teacher": {"source": "teacher"}}


@pytest.fixture
def job(client, body):
    """A queued recovery."""
    return client.post("/v1/recoveries", json=body).json()


@pytest.fixture
def claim(ledger, job):
    """The same recovery, running."""
    return ledger.claim("worker", ["gpu.cpu"], 30)


@pytest.fixture
def finish(settings, ledger, claim, tmp_path):
    """Lets the recovery succeed and publish texts or bytes, by their paths; returns its id."""

    def succeed(texts):
        files = {path: tmp_path / str(number) for number, path in enumerate(texts)}
        for path, text in texts.items():
            files[path].write_bytes(text if isinstance(text, bytes) else text.encode())
        place = f"{claim.job_id}/e{claim.epoch}/package"
        publish(open_store(settings), place, files)
        ledger.commit_stage(claim, "package", place)
        ledger.succeed(claim, "recovered")
        return claim.job_id

    return succeed


@pytest.fixture
def finished(finish):
    """The id of a recovery that succeeded and published its report."""
    return finish(
        {
            "report.json": json.dumps(REPORT),
            "alignment.json": json.dumps(REPORT["alignment"]),
            **{f"alignment.{suffix}": suffix for suffix in ("csv", "svg", "png")},
            "report.html": "<!doctype html><title>Report</title>",
            "recipe.py": SCRIPT,
            "adapter/adapter_config.json": "{}",
        }
    )


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "student"}
PROBE = {
    "object": "recovery.probe",
    "base_sha256": "0" * 64,
    "rows": [{"ids": [1, 2], "token": 3, "base": -3.0, "recovered": -1.0}],
}


@pytest.fixture
def deployable(finish):
    """The id of a recovery that handed over an adapter which can be served."""
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    weights = save({f"{layer}.lora_{part}.weight": numpy.ones((4, 4), numpy.float32) for part in "AB"})
    return finish(
        {
            "report.json": json.dumps(REPORT),
            "probe.json": json.dumps(PROBE),
            "adapter/adapter_config.json": json.dumps(LORA),
            "adapter/adapter_model.safetensors": weights,
        }
    )


@pytest.fixture
def serving_settings(settings):
    """With a server that nobody has started."""
    return settings.model_copy(update={"serve_urls": ["http://127.0.0.1:9"]})


@pytest.fixture
def deploying(serving_settings, ledger):
    """A client of an installation that has a server to deploy to; nothing is placed there."""
    app = create_app(serving_settings, ledger, sweep=False)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client
