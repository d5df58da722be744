"""One device shared in turns, with a real vLLM: there while the teacher is asked, and never beside a model.

RECOUP_TEST_VLLM_PYTHON=… pytest -m slow tests/journey/test_real_vllm_turns.py
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from recoup import Client, Recovery
from recoup_jobs.settings import Settings
from recoup_server.embedded import running

pytestmark = [
    pytest.mark.slow,  # a vLLM takes a minute to start, and starts three times
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "RECOUP_TEST_VLLM_PYTHON" not in os.environ,
        reason="RECOUP_TEST_VLLM_PYTHON names no environment of vLLM (deploy/vllm/environment.sh)",
    ),
]
REQUEST = {
    "method": {"type": "off_policy"},
    "generation": {"max_new_tokens": 12},
    "training": {"steps": 20, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"test_sequences": 32, "validation_sequences": 16, "baselines": False},
    "alignment": {"positions": 256},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    python = Path(os.environ["RECOUP_TEST_VLLM_PYTHON"])
    return Settings(home=tmp_path_factory.mktemp("turns"), vllm_python=python, vllm_in_turns=True)


@pytest.fixture(scope="module")
def client(settings: Settings, free_port: int, write_tiny_models: Callable[..., Path]) -> Iterator[Client]:
    write_tiny_models(settings.model_roots[0], hidden_size=128)  # as wide as vLLM's kernels want them
    with running(settings, "127.0.0.1", free_port) as installation, Client(installation.url) as client:
        yield client


def processes(settings: Settings, word: str) -> list[psutil.Process]:
    """Of this installation, those whose command has this word."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("RECOUP_HOME", "").startswith(str(settings.home))
            if ours and any(word in part for part in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def watched(client: Client, settings: Settings, job: str, seen: dict[str, set[bool]]) -> Recovery:
    """Notes in which stages a vLLM is there, until the recovery ends."""
    while (now := client.recoveries.get(job)).state in {"queued", "running"}:
        there = bool(processes(settings, "vllm.entrypoints"))
        after = client.recoveries.get(job)
        if after.stage == now.stage is not None:
            seen.setdefault(now.stage, set()).add(there)
        time.sleep(0.2)
    return now


def test_a_vllm_is_started_for_the_stages_that_ask_it_and_dies_with_a_runner_that_is_killed(
    client: Client, settings: Settings, write_rows: Callable[[int], Path]
) -> None:
    file = client.files.create(write_rows(300)).id
    job = client.recoveries.create(student="student", teacher="teacher", prompts={"file": file}, **REQUEST)
    until = time.monotonic() + 1800  # a machine that is busy with other work takes its time
    while not (processes(settings, "vllm.entrypoints") and client.recoveries.get(job.id).stage == "generate"):
        assert time.monotonic() < until
        time.sleep(0.2)
    (runner,) = processes(settings, "recoup_worker.runner")
    while len(started := runner.children(recursive=True)) < 3:  # the launcher, its guard, vLLM
        assert time.monotonic() < until
        time.sleep(0.2)
    os.kill(runner.pid, signal.SIGKILL)
    assert psutil.wait_procs(started, timeout=60)[1] == []

    seen: dict[str, set[bool]] = {}
    ended = watched(client, settings, job.id, seen)
    assert ended.state == "succeeded", ended.error
    assert client.recoveries.report(job.id).training is not None
    assert True in seen["generate"]
    assert seen["distil"] == {False}
    assert processes(settings, "vllm.entrypoints") == []
