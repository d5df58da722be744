"""How many claims and how many POSTs a second the ledger bears, with eight processes racing.

    python benchmarks/ledger.py                                      SQLite, in a temporary folder
    python benchmarks/ledger.py postgresql+psycopg://user@host/db    PostgreSQL, whose tables it fills

Claims: jobs are created first, then eight workers claim until nothing is left; each job must have
been claimed once. POSTs: one API process, eight clients that each send one recovery after another
over a connection of their own; every accepted one must be in the ledger.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy
from safetensors.numpy import save_file

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings

WORKERS, JOBS, SECONDS, START_SECONDS = 8, 500, 15.0, 20.0
UNLIMITED = {"requests_per_second": 1e6, "request_burst": 1_000_000, "max_live_jobs": 1_000_000}
PORT = 8399
URL = f"http://127.0.0.1:{PORT}"
BODY = {"student": {"source": "student"}, "teacher": {"source": "teacher"}}


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(
            home=Path(home), database_url=sys.argv[1] if len(sys.argv) > 1 else None, **UNLIMITED
        )
        print(f"{'PostgreSQL' if len(sys.argv) > 1 else 'SQLite'}, {WORKERS} processes")
        print(f"claims per second: {claims(settings):.0f}")
        print(f"POSTs per second:  {posts(settings):.0f}")


def claims(settings: Settings) -> float:
    ledger = open_ledger(settings)
    request = CreateRecovery(student=ModelRef(source="student"), teacher=ModelRef(source="teacher"))
    created = {ledger.create(request, "gpu.cpu").id for _ in range(JOBS)}
    taken, seconds = race(claim_all, settings)
    if sorted(taken) != sorted(created):
        raise SystemExit(f"{len(taken)} claims of {len(created)} jobs, {len({*taken})} of them different")
    ledger.close()
    return JOBS / seconds


def posts(settings: Settings) -> float:
    for name in ("student", "teacher"):
        write_model(settings.model_roots[0] / name)
    with api(settings):
        accepted, seconds = race(post_all, settings)
    ledger = open_ledger(settings)
    for id in accepted:
        ledger.get(id)
    ledger.close()
    return len(accepted) / seconds


def race(work: Callable[[Settings, float], list[str]], settings: Settings) -> tuple[list[str], float]:
    """The ids that all workers brought home, and the seconds from the start to the last one's end."""
    start_at = time.time() + START_SECONDS
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(timed, work, settings, start_at) for _ in range(WORKERS)]
        brought = [result.result() for result in results]
    return [id for ids, _ in brought for id in ids], max(end for _, end in brought) - start_at


def timed(
    work: Callable[[Settings, float], list[str]], settings: Settings, start_at: float
) -> tuple[list[str], float]:
    return work(settings, start_at), time.time()


def claim_all(settings: Settings, start_at: float) -> list[str]:
    ledger = open_ledger(settings)
    time.sleep(max(0.0, start_at - time.time()))
    taken = []
    while (claim := ledger.claim("racer", ["gpu.cpu"], 3600)) is not None:
        taken.append(claim.job_id)
    return taken


def post_all(_: Settings, start_at: float) -> list[str]:
    accepted = []
    with httpx2.Client(base_url=URL, timeout=30.0) as client:
        time.sleep(max(0.0, start_at - time.time()))
        while time.time() < start_at + SECONDS:
            answer = client.post("/v1/recoveries", json=BODY)
            answer.raise_for_status()
            accepted.append(answer.json()["id"])
    return accepted


@contextmanager
def api(settings: Settings) -> Iterator[None]:
    command = [sys.executable, "-m", "recoup_server", "api", "--port", str(PORT)]
    environment = settings.environment() | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None and not answers():
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def answers() -> bool:
    try:
        return httpx2.get(f"{URL}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    save_file({"w": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
