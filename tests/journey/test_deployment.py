"""From a recovery to an answer, on an installation without vLLM: the local engine comes when it is wanted."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recoup import Client, NotFoundError
from recoup_jobs.settings import Settings

QUESTION = [{"role": "user", "content": "w1 w2 w3"}]


@pytest.fixture(scope="module")
def recovery(client: Client, models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of one that handed weights over."""
    rows = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "w{at % 120} w{at * 7 % 120}", "kind": "k{at % 5}"}}\n' for at in range(300))
    )
    job = client.recoveries.create(
        student="student",
        teacher="teacher",
        prompts={"file": client.files.create(rows).id},
        generation={"max_new_tokens": 12},
        training={"steps": 60, "batch_size": 8, "learning_rate": 0.01, "stop_early": False},
        method={"type": "off_policy"},
        evaluation={
            "test_sequences": 32,
            "validation_sequences": 16,
            "baselines": False,
            "gate": {"max_regression": 1.0},
        },
        alignment={"positions": 256},
    )
    ended = client.recoveries.wait(job.id, timeout=400)
    assert ended.outcome in {"recovered", "partial"}, client.recoveries.report(job.id).reason
    return job.id


def engines(settings: Settings) -> list[psutil.Process]:
    """Of this installation."""
    found = []
    for process in psutil.process_iter():
        try:
            if "engine" in process.cmdline() and process.environ().get("RECOUP_HOME") == str(settings.home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_recovered_model_answers_and_survives_the_death_of_its_engine(
    client: Client, recovery: str, settings: Settings
) -> None:
    assert engines(settings) == []
    made = client.deployments.create(recovery, name="support")
    live = client.deployments.wait(made.id, timeout=240)
    assert [replica.state for replica in live.replicas] == ["ready"]
    answer = client.deployments.chat("support", QUESTION, max_tokens=8)
    assert answer

    os.kill(engines(settings)[0].pid, signal.SIGKILL)
    wait_until(lambda: client.deployments.get(made.id).replicas[0].state == "away")
    wait_until(lambda: client.deployments.get(made.id).replicas[0].state == "ready")
    assert client.deployments.chat("support", QUESTION, max_tokens=8) == answer

    assert client.deployments.delete(made.id).state == "withdrawn"
    wait_until(lambda: engines(settings) == [])
    with pytest.raises(NotFoundError):
        client.deployments.chat("support", QUESTION)
