"""CPU-milliseconds of a request, beside litestar + msgspec and beside plain FastAPI + ORM; watchers of a job.

    python benchmarks/api.py            (needs the extra `bench`)

Each application is a process of its own under the same uvicorn, loaded over keep-alive connections. What is
counted is its CPU time, not the time on a clock: that stays the same on a machine that has other work.
`recoup` is the service as it is. `litestar` does the same work with the same functions: keys, scopes, calls
a second, strict JSON into the same pydantic contract, preflight of two model folders, quota and ledger;
msgspec encodes. It has no metrics, no trace, no request ids, no limits of sizes and no error answers. `plain`
is what one writes first: FastAPI, an ORM session a request, two inserts; no preflight, no quota, no key.
The applications take turns; each figure is the least of its rounds.
"""

import asyncio
import contextlib
import gc
import http.client
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = "benchmark"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
REQUEST = {
    "student": {"source": "student"},
    "teacher": {"source": "teacher"},
    "training": {"steps": 200, "lora": {"rank": 16}},
    "metadata": {"run": "benchmark"},
}
PORT, THREADS, WARM_UP, REQUESTS, ROUNDS = 18411, 4, 60, 400, 3
WATCHERS, WATCHED_SECONDS = 1000, 10.0


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        rounds = [{name: _measure(name, Path(home) / f"{name}{n}") for name in APPS} for n in range(ROUNDS)]
        watchers = _measure_watchers(Path(home) / "watchers")
    print("| application | POST, CPU-ms | GET, CPU-ms |\n|---|---|---|")
    best = {name: tuple(min(run[name][of] for run in rounds) for of in (0, 1)) for name in APPS}
    for name, (post, get) in best.items():
        print(f"| {name} | {post:.2f} | {get:.2f} |")
    for of, verb in enumerate(("POST", "GET")):
        ratios = [f"{best['recoup'][of] / best[peer][of]:.2f} of {peer}" for peer in ("litestar", "plain")]
        print(f"{verb}: recoup takes {' and '.join(ratios)}")
    print(f"{WATCHERS} watchers of one job, between events: {100 * watchers:.1f} % of a core")


def _measure(name: str, home: Path) -> tuple[float, float]:
    """(POST, GET) in CPU-milliseconds a request."""
    with _serving(name, home) as pid:
        ids = _load(pid, "POST", "/v1/recoveries", WARM_UP)[1]
        post, _ = _load(pid, "POST", "/v1/recoveries", REQUESTS)
        path = f"/v1/recoveries/{ids[0]}"
        _load(pid, "GET", path, WARM_UP)
        return post, _load(pid, "GET", path, REQUESTS)[0]


def _measure_watchers(home: Path) -> float:
    """CPU seconds a second."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 8192), limit))
    with _serving("recoup", home) as pid:
        id = _load(pid, "POST", "/v1/recoveries", THREADS)[1][0]
        return asyncio.run(_watch(pid, id))


async def _watch(pid: int, id: str) -> float:
    ask = f"GET /v1/recoveries/{id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
    connections = []
    for _ in range(WATCHERS):
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(f"{ask}Authorization: Bearer {KEY}\r\n\r\n".encode())
        await reader.readuntil(b'"state":"queued"')
        connections.append(writer)
    await asyncio.sleep(2.0)
    before = _cpu_seconds(pid)
    await asyncio.sleep(WATCHED_SECONDS)
    spent = _cpu_seconds(pid) - before
    for writer in connections:
        writer.close()
    return spent / WATCHED_SECONDS


def _load(pid: int, method: str, path: str, count: int) -> tuple[float, list[str]]:
    """CPU-milliseconds a request, and the ids that were answered."""
    ids: list[str] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        for _ in range(count // THREADS):
            connection.request(method, path, json.dumps(REQUEST) if method == "POST" else None, HEADERS)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status not in {200, 201, 202}:
                raise RuntimeError(f"{answer.status}: {text[:500]!r}")
            ids.append(json.loads(text)["id"])

    before = _cpu_seconds(pid)
    threads = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1000 * (_cpu_seconds(pid) - before) / len(ids), ids


def _cpu_seconds(pid: int) -> float:
    """By the clock that clock_getcpuclockid(3) names: /proc counts in ticks of forty requests."""
    return time.clock_gettime(~pid << 3 | 2)


@contextlib.contextmanager
def _serving(name: str, home: Path) -> Iterator[int]:
    server = subprocess.Popen([sys.executable, __file__, name, str(home)])
    try:
        while True:
            with contextlib.suppress(OSError):
                http.client.HTTPConnection("127.0.0.1", PORT, timeout=5).connect()
                break
            if server.poll() is not None:
                raise SystemExit(f"{name} did not start, see above; all of it needs pip install -e .[bench]")
            time.sleep(0.2)
        yield server.pid
    finally:
        server.terminate()
        server.wait()


def _settings(home: Path) -> Any:
    import numpy
    from safetensors.numpy import save_file

    from recoup_jobs.settings import Settings

    settings = Settings(
        home=home, api_key=KEY, requests_per_second=1e9, request_burst=10**9, max_live_jobs=10**9
    )
    for name in ("student", "teacher"):
        folder = settings.model_roots[0] / name
        folder.mkdir(parents=True)
        config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 3}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
        save_file({"w": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")
    return settings


def _recoup(home: Path) -> Any:
    from recoup_api.app import create_app
    from recoup_jobs.ledger import open_ledger

    settings = _settings(home)
    return create_app(settings, open_ledger(settings))


def _litestar(home: Path) -> Any:
    import msgspec
    from litestar import Litestar, Request, Response, get, post
    from litestar.exceptions import NotAuthorizedException

    from recoup.schemas import CreateRecovery
    from recoup_api.body import parse
    from recoup_api.rates import Rates
    from recoup_jobs.errors import Forbidden
    from recoup_jobs.inspection import Inspections
    from recoup_jobs.keys import Caller, Keyring
    from recoup_jobs.ledger import open_ledger
    from recoup_jobs.preflight import preflight
    from recoup_jobs.quotas import require_room_for_job

    settings = _settings(home)
    ledger = open_ledger(settings)
    keys, inspections = Keyring(ledger, settings.api_key), Inspections()
    rates = Rates(settings.requests_per_second, settings.request_burst)

    def caller_of(request: Request[Any, Any, Any], scope: str) -> Caller:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            raise NotAuthorizedException
        caller = keys.remembered(key) or keys.admit(key)
        rates.take(caller.tenant)
        if scope not in caller.scopes:
            raise Forbidden("insufficient_scope", scope)
        return caller

    def answer(recovery: Any, status: int) -> Response[bytes]:
        content = msgspec.json.encode(recovery.model_dump(mode="json"))
        etag = {"ETag": f'"{recovery.version}"'}
        return Response(content, status_code=status, headers=etag, media_type="application/json")

    @post("/v1/recoveries", sync_to_thread=True)
    def create(request: Request[Any, Any, Any], body: bytes) -> Response[bytes]:
        tenant = caller_of(request, "jobs:write").tenant
        asked = parse(CreateRecovery, body)
        preflight(asked, ledger, settings, tenant, inspections)

        def also(conn: Any, _: Any) -> None:
            require_room_for_job(conn, tenant, settings.max_live_jobs)

        return answer(ledger.create(asked, settings.queue, tenant, also), 202)

    @get("/v1/recoveries/{id:str}", sync_to_thread=True)
    def read(request: Request[Any, Any, Any], id: str) -> Response[bytes]:
        return answer(ledger.get(id, caller_of(request, "jobs:read").tenant), 200)

    return Litestar([create, read])


def _plain(home: Path) -> Any:
    import uuid

    from fastapi import FastAPI
    from sqlalchemy import JSON, ForeignKey, create_engine, event
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

    from recoup.schemas import CreateRecovery

    class Base(DeclarativeBase):
        pass

    class Job(Base):
        __tablename__ = "jobs"
        id: Mapped[str] = mapped_column(primary_key=True)
        state: Mapped[str]
        request: Mapped[dict[str, Any]] = mapped_column(JSON)
        created_at: Mapped[float]
        events: Mapped[list["Event"]] = relationship()

    class Event(Base):
        __tablename__ = "events"
        number: Mapped[int] = mapped_column(primary_key=True)
        job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
        type: Mapped[str]

    home.mkdir()
    engine = create_engine(f"sqlite:///{home / 'plain.db'}")
    event.listen(engine, "connect", lambda conn, _: conn.execute("PRAGMA journal_mode = WAL"))
    Base.metadata.create_all(engine)
    app = FastAPI()

    def shown(job: Job) -> dict[str, Any]:
        return {"id": job.id, "state": job.state, "request": job.request, "created_at": job.created_at}

    @app.post("/v1/recoveries", status_code=202)
    def create(body: CreateRecovery) -> dict[str, Any]:
        with Session(engine) as session:
            asked = body.model_dump(mode="json")
            job = Job(id=uuid.uuid4().hex, state="queued", request=asked, created_at=time.time())
            job.events.append(Event(type="state"))
            session.add(job)
            session.commit()
            return shown(job)

    @app.get("/v1/recoveries/{id}")
    def read(id: str) -> dict[str, Any]:
        with Session(engine) as session:
            return shown(session.get_one(Job, id))

    return app


APPS = {"recoup": _recoup, "litestar": _litestar, "plain": _plain}

if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        import uvicorn

        served = APPS[sys.argv[1]](Path(sys.argv[2]))
        gc.freeze()  # as `recoup-server api` does
        uvicorn.run(served, port=PORT, log_level="error")
