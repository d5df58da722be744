"""A real vLLM rewrites 500 references for a recovery whose runner is killed on the way: each once, counted.

RECOUP_TEST_VLLM_PYTHON=… pytest -m slow tests/journey/test_real_vllm_teacher.py
"""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from recoup import Client
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings
from recoup_ml import injure, smollm
from recoup_ml.answer_cache import AnswerCache
from recoup_ml.tickets import ticket_rows
from recoup_server.embedded import running as installed
from recoup_server.teacher import Teacher, find_build, running

pytestmark = [
    pytest.mark.slow,  # some ten minutes of two cores
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        "RECOUP_TEST_VLLM_PYTHON" not in os.environ,
        reason="RECOUP_TEST_VLLM_PYTHON names no environment of vLLM (deploy/vllm/environment.sh)",
    ),
]
STEPS, BATCH = 63, 8
REWRITES = STEPS * BATCH
REQUEST = {
    "method": {"type": "rewrite_sft"},
    "generation": {"max_new_tokens": 24},
    "training": {"steps": STEPS, "batch_size": BATCH},
    "evaluation": {"test_sequences": 16, "validation_sequences": 8, "baselines": False},
    "alignment": {"positions": 256},
}
IN_FLIGHT = 256
"""More than the client asks at once: so many answers at most a killed runner never heard of."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewriting")


@pytest.fixture(scope="module")
def server(home: Path, free_port: int) -> Iterator[str]:
    """The URL of a vLLM of the healthy model."""
    model = home / "models" / "smollm2"
    model.parent.mkdir()
    smollm.convert(model)
    injure.finetune(model, model.with_name("forgetful"), steps=4)
    asked = Teacher(model, "127.0.0.1", free_port, 1024, ())
    with running(asked, find_build(Path(os.environ["RECOUP_TEST_VLLM_PYTHON"])), Settings(home=home)):
        yield asked.url


@pytest.fixture(scope="module")
def settings(home: Path, server: str) -> Settings:
    return Settings(home=home / "service", model_roots=[home / "models"], vllm_urls=[server], lease_seconds=5)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with installed(settings, "127.0.0.1", port) as installation, Client(installation.url) as client:
        yield client


def until(holds: Callable[[], object], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def finished_requests(url: str) -> int:
    """How many requests vLLM has answered to their end."""
    shown = httpx2.get(f"{url}/metrics").text
    counts = re.findall(r'request_success_total\{[^}]*finished_reason="(?:stop|length)"[^}]*\} (\S+)', shown)
    return int(sum(map(float, counts)))


def test_every_reference_is_rewritten_once_though_the_runner_is_killed(
    client: Client, settings: Settings, server: str, tmp_path: Path
) -> None:
    data = tmp_path / "tickets.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ticket_rows(REWRITES + 120, seed=5)))
    file = client.files.create(data).id
    job = client.recoveries.create(student="forgetful", teacher="smollm2", prompts={"file": file}, **REQUEST)

    def progress(stage: str, least: int) -> bool:
        now = client.recoveries.get(job.id)
        assert now.state in {"queued", "running"}, now.error
        return now.stage == stage and now.progress is not None and now.progress.done >= least

    until(lambda: progress("generate", REWRITES // 2))
    runner = next(p for p in psutil.process_iter(["cmdline"]) if job.id in (p.info["cmdline"] or []))
    os.kill(runner.pid, signal.SIGKILL)
    until(lambda: progress("distil", 0))
    client.recoveries.cancel(job.id)
    client.recoveries.wait(job.id, timeout=120)

    ledger = open_ledger(settings)
    folder = settings.stage_folder(ledger.committed(job.id)["generate"])
    ledger.close()
    rows = [json.loads(line) for line in (folder / "rewrites.jsonl").read_text().splitlines()]
    assert len(rows) == REWRITES == len({row["prompt"] for row in rows})
    kept = [row for row in rows if row["source"] == "rewrite"]
    originals = [row for row in rows if row["source"] == "original"]
    assert kept and len(kept) + len(originals) == REWRITES
    assert all(row["answer"] == row["reference"] and row["reason"] for row in originals)
    with AnswerCache(settings.home / "answers") as cache:
        remembered = len(cache)
    assert remembered <= finished_requests(server) <= remembered + IN_FLIGHT
    print(f"{len(kept)} rewrites kept, {len(originals)} originals; {finished_requests(server)} requests")
