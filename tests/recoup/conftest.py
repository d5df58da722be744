"""A Recoup server of a few lines on loopback: it keeps jobs, moves them on, and can misbehave."""

import asyncio
import hashlib
import inspect
import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from recoup import AsyncClient, Client
from recoup.schemas import CreateRecovery, Report

PAGE = 2
"""Items a page, so that any list has several."""


@dataclass(frozen=True)
class Fault:
    """What one request gets instead of its answer; without a status the connection is dropped."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"<html>busy</html>"
    delay: float = 0.0
    """Seconds of silence before it."""
    heard: bool = False
    """Whether the request is carried out, and only its answer lost."""
    cut: int | None = None
    """The true answer, but only so many bytes of its body."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Moment:
    """One step of a job: what changes in its row, and the events that this adds."""

    changes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...] = ()


def progress(stage: str, done: int, total: int, unit: str) -> dict[str, Any]:
    row = {"stage": stage, "done": done, "total": total, "unit": unit, "eta_seconds": 90.0}
    return {"stage": stage, "progress": row}


RUN = (
    Moment({"state": "running"}, (("state", {"state": "running"}), ("log", {"message": "picked up"}))),
    Moment(progress("generate", 3, 8, "answers"), (("stage", {"stage": "generate", "status": "started"}),)),
    Moment(
        progress("distil", 12, 60, "steps"),
        (
            ("stage", {"stage": "generate", "status": "committed"}),
            ("stage", {"stage": "distil", "status": "started"}),
            ("metric", {"name": "train", "step": 12, "loss": 0.42, "learning_rate": 1e-4}),
            ("metric", {"name": "validation", "step": 12, "kl": 0.31}),
        ),
    ),
)
SUCCESS = (*RUN, Moment({"state": "succeeded", "outcome": "recovered"}, (("state", {"state": "succeeded"}),)))
FAILURE = (
    *RUN,
    Moment(
        {
            "state": "failed",
            "error": {"code": "out_of_memory", "message": "The device has too little memory."},
        },
        (("state", {"state": "failed"}),),
    ),
)
ENDLESS = (*RUN,)
DRY_RUN = {
    "object": "recovery.dry_run",
    "plan": [{"name": "method", "value": "off_policy", "why": "the student was pruned"}],
    "findings": [],
    "warnings": [],
    "estimate": {
        "tokens": 12_000,
        "memory_bytes": 2**31,
        "disk_bytes": 2**29,
        "seconds": 200.0,
        "calibrated_on": 3,
    },
}


class FakeService:
    """Jobs in memory behind the routes of `/v1`. A long poll moves a job on by one moment."""

    def __init__(self) -> None:
        self.script: tuple[Moment, ...] = SUCCESS
        self.jobs: dict[str, dict[str, Any]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.artifacts = {"adapter/weights.safetensors": b"w" * 70_000, "report.json": b"{}"}
        self.sent_instead: dict[str, bytes] = {}
        self.diagnoses: deque[tuple[int, bytes]] = deque()
        """Status and body of each answer below `/v1/diagnoses`, in turn."""
        self.deployments: deque[tuple[int, bytes]] = deque()
        """Likewise of `/v1/deployments` and `/v1/chat`."""
        self.key: str | None = None
        self.dry_run = DRY_RUN
        self.faults: deque[Fault | None] = deque()
        self.tears: deque[int] = deque()
        """After so many events a stream breaks in the middle of the next one; one number a stream."""
        self.seen: list[Request] = []
        self._moments: dict[str, deque[Moment]] = {}
        self._answered: dict[str, tuple[int, bytes]] = {}
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection, as a killed process does."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in [*self._live]:
            with suppress(OSError):  # the other side may have left first
                connection.shutdown(socket.SHUT_RDWR)

    def silence(self) -> AbstractContextManager[Any]:
        """While this is entered, requests are read and not answered."""
        return self._lock

    def sent(self, method: str, path: str) -> list[Request]:
        return [request for request in self.seen if (request.method, request.path) == (method, path)]

    def answer(self, request: Request) -> tuple[int, bytes]:
        with self._lock:
            if request.path == "/readyz":
                return _json(200, {"status": "ready"})
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return _problem(401, "unauthenticated", "This server asks for a key.")
            key = request.headers.get("Idempotency-Key", "")
            if key not in self._answered or not key:
                self._answered[key] = self._route(request)
            return self._answered[key]

    def _route(self, request: Request) -> tuple[int, bytes]:
        kind, *rest = request.path.removeprefix("/v1/").split("/", 2)
        routes: dict[str, Callable[..., tuple[int, bytes]]] = {
            "recoveries": self._recoveries,
            "files": self._files,
            "capabilities": self._capabilities,
            "diagnoses": lambda request, *rest: self.diagnoses.popleft(),
            "deployments": lambda request, *rest: self.deployments.popleft(),
            "chat": lambda request, *rest: self.deployments.popleft(),
        }
        return routes[kind](request, *rest)

    def _capabilities(self, request: Request) -> tuple[int, bytes]:
        names = ("damages", "methods", "training_modes", "models")
        return _json(200, {"version": "0.1.0"} | {name: ["x"] for name in names})

    def _recoveries(self, request: Request, id: str | None = None, rest: str = "") -> tuple[int, bytes]:
        if id is None:
            return (
                self._create(request) if request.method == "POST" else _page(request, [*self.jobs.values()])
            )
        if id not in self.jobs:
            return _problem(404, "not_found", f"There is no recovery {id}.")
        verb, _, path = rest.partition("/")
        routes: dict[str, Callable[..., tuple[int, bytes]]] = {
            "": self._change if request.method == "PATCH" else self._read,
            "cancel": self._cancel,
            "pause": lambda request, id: self._steer(id, {"queued", "running"}, "paused"),
            "resume": lambda request, id: self._steer(id, {"paused"}, "queued"),
            "retry": lambda request, id: self._retry(id),
            "events": lambda request, id: _page(request, self.events[id], key="seq"),
            "report": self._report,
            "alignment": lambda request, id: (200, report(id).alignment.model_dump_json().encode()),
            "recipe": lambda request, id: (200, 'print("trained: β")\n'.encode()),
            "artifacts": lambda request, id: self._artifact(request, unquote(path)),
        }
        return routes[verb](request, id)

    def _create(self, request: Request) -> tuple[int, bytes]:
        if request.query.get("dry_run") == "true":
            return _json(200, self.dry_run)
        return self._queue(CreateRecovery.model_validate_json(request.body).model_dump(mode="json"))

    def _queue(self, asked: dict[str, Any], retry_of: str | None = None) -> tuple[int, bytes]:
        id = f"rec_{len(self.jobs) + 1:024x}"
        empty = dict.fromkeys(("stage", "outcome", "error", "progress", "started_at", "finished_at"))
        row = {"id": id, "object": "recovery", "state": "queued", "request": asked, "epoch": 0, "version": 1}
        row |= {"pausing": False, "retry_of": retry_of, "failures": 0, "losses": 0}
        self.jobs[id] = row | empty | {"created_at": 1.0}
        self.events[id] = []
        self._moments[id] = deque(self.script)
        self._add(id, "state", {"state": "queued"})
        return _json(202, self.jobs[id])

    def _read(self, request: Request, id: str) -> tuple[int, bytes]:
        known = request.headers.get("If-None-Match") == f'"{self.jobs[id]["version"]}"'
        if known and "wait" in request.query and self._moments[id]:
            self._move(id, self._moments[id].popleft())
            known = False
        return (304, b"") if known else _json(200, self.jobs[id])

    def _cancel(self, request: Request, id: str) -> tuple[int, bytes]:
        if self.jobs[id]["state"] in {"succeeded", "failed", "cancelled"}:
            return _problem(409, "conflict", f"The recovery is {self.jobs[id]['state']}.")
        self._move(id, Moment({"state": "cancelling"}))
        self._moments[id] = deque([Moment({"state": "cancelled"})])
        return _json(200, self.jobs[id])

    def _steer(self, id: str, allowed: set[str], state: str) -> tuple[int, bytes]:
        if self.jobs[id]["state"] not in allowed:
            return _problem(409, "conflict", f"The recovery is {self.jobs[id]['state']}.")
        self._move(id, Moment({"state": state}))
        return _json(200, self.jobs[id])

    def _retry(self, id: str) -> tuple[int, bytes]:
        if self.jobs[id]["state"] not in {"failed", "cancelled"}:
            return _problem(409, "conflict", f"The recovery is {self.jobs[id]['state']}.")
        return self._queue(self.jobs[id]["request"], retry_of=id)

    def _change(self, request: Request, id: str) -> tuple[int, bytes]:
        asked = self.jobs[id]["request"] | json.loads(request.body)
        self._move(id, Moment({"request": asked}))
        return _json(200, self.jobs[id])

    def knows(self, request: Request) -> bool:
        return request.path.split("/")[3] in self.jobs

    def stream(self, request: Request) -> Iterator[bytes]:
        """The frames of a job's events after the last one known, while the job moves on."""
        id = request.path.split("/")[3]
        seq = int(request.headers.get("Last-Event-ID", 0))
        left = self.tears.popleft() if self.tears else None
        yield b": hello\n\n"
        while True:
            with self._lock:
                if len(self.events[id]) <= seq and self._moments[id]:
                    self._move(id, self._moments[id].popleft())
                rows = self.events[id][seq:]
                over = self.jobs[id]["state"] in {"succeeded", "failed", "cancelled"}
            for row in rows:
                frame = f"id: {row['seq']}\nevent: {row['type']}\ndata: {json.dumps(row)}\n\n".encode()
                if left is not None and (left := left - 1) < 0:
                    yield frame[:-9]
                    raise ConnectionAbortedError
                yield frame
                seq = row["seq"]
            if over and not rows:
                yield b"event: end\ndata: {}\n\n"
                return
            time.sleep(0.02)
            yield b": still here\n\n"

    def _report(self, request: Request, id: str) -> tuple[int, bytes]:
        if request.headers.get("Accept") == "text/html":
            return 200, b"<html>the report</html>"
        return 200, report(id).model_dump_json().encode()

    def _artifact(self, request: Request, path: str) -> tuple[int, bytes]:
        if path:
            return 200, self.sent_instead.get(path, self.artifacts[path])
        rows = [_manifest_entry(path, content) for path, content in self.artifacts.items()]
        return _page(request, rows, key="path")

    def _files(self, request: Request, id: str | None = None, rest: str = "") -> tuple[int, bytes]:
        if request.method == "POST":
            return self._upload(request)
        if id is None:
            return _page(request, [*self.files.values()])
        if id not in self.files:
            return _problem(404, "not_found", f"There is no file {id}.")
        if rest == "content":
            return 200, self.contents[id]
        return _json(200, self.files.pop(id) if request.method == "DELETE" else self.files[id])

    def _upload(self, request: Request) -> tuple[int, bytes]:
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part
            for part in message_from_bytes(head + request.body).get_payload()
        }
        content = parts["file"].get_payload(decode=True)
        id = f"file-{len(self.files) + 1:024x}"
        row = {"id": id, "object": "file", "created_at": 1, "filename": parts["file"].get_filename()}
        row |= {
            "bytes": len(content),
            "purpose": parts["purpose"].get_payload(),
            "status": "processed",
            "rows": content.count(b"\n"),
        }
        self.files[id] = row | {"sha256": hashlib.sha256(content).hexdigest()}
        self.contents[id] = content
        return _json(200, self.files[id])

    def _move(self, id: str, moment: Moment) -> None:
        self.jobs[id] = self.jobs[id] | moment.changes | {"version": self.jobs[id]["version"] + 1}
        for type, data in moment.events:
            self._add(id, type, data)

    def _add(self, id: str, type: str, data: dict[str, Any]) -> None:
        seq = len(self.events[id]) + 1
        event = {"object": "recovery.event", "seq": seq, "epoch": 1, "type": type, "data": data, "at": 1.0}
        self.events[id].append(event)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that has gone is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # head and body leave together, else each answer waits for a delayed ACK

        def setup(self) -> None:
            super().setup()
            service._live.add(self.connection)

        def finish(self) -> None:
            service._live.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, address.path, query, dict(self.headers), body)
            service.seen.append(request)
            fault = service.faults.popleft() if service.faults else None
            if fault is None or fault.heard or fault.cut is not None:
                if request.headers.get("Accept") == "text/event-stream" and service.knows(request):
                    self._stream(service.stream(request))
                    return
                answer = service.answer(request)
            if fault is None or fault.cut is not None:
                self._reply(*_part(request, *answer), cut=fault and fault.cut)
                return
            time.sleep(fault.delay)
            if fault.status is None:
                self.close_connection = True
            else:
                self._reply(fault.status, fault.body, fault.headers)

        do_POST = do_PATCH = do_DELETE = do_GET

        def _stream(self, frames: Iterator[bytes]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            with suppress(ConnectionError, ValueError):  # torn on purpose, or the other side has gone
                for frame in frames:
                    self.wfile.write(f"{len(frame):x}\r\n".encode() + frame + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

        def _reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in (
                {"Content-Length": str(len(body)), "x-request-id": "req_1"} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut is not None

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _part(request: Request, status: int, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    """The part of an artifact that the request asks for."""
    asked = request.headers.get("Range", "")
    if not asked or "/artifacts/" not in request.path:
        return status, body, {}
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    return 206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}


def _json(status: int, value: Any) -> tuple[int, bytes]:
    return status, json.dumps(value).encode()


def _problem(status: int, code: str, detail: str) -> tuple[int, bytes]:
    row = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    return _json(status, row | {"request_id": "req_1", "errors": []})


def _page(request: Request, rows: list[dict[str, Any]], key: str = "id") -> tuple[int, bytes]:
    after = request.query.get("after")
    start = int(after or 0) if key == "seq" else [None, *(str(row[key]) for row in rows)].index(after)
    data = rows[start : start + PAGE]
    more = start + PAGE < len(rows)
    cursor = str(data[-1][key]) if more else None
    return _json(200, {"object": "list", "data": data, "has_more": more, "next_cursor": cursor})


def _manifest_entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"object": "artifact", "path": path, "size": len(content), "sha256": digest}


def report(id: str = "rec_1", **changes: Any) -> Report:
    """The report of a recovery that went well, with changes."""
    fields = json.loads(Path(__file__).with_name("report.json").read_text(encoding="utf-8"))
    return Report.model_validate(fields | {"recovery": id} | changes)


@pytest.fixture(name="report")
def report_fixture() -> Callable[..., Report]:
    return report


@pytest.fixture
def service() -> Iterator[FakeService]:
    service = FakeService()
    service.start()
    yield service
    service.stop()


class Blocking:
    """An `AsyncClient`, or a part of one, that is called as a `Client` is: so one test tries both."""

    def __init__(self, part: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._part, self._loop = part, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if inspect.ismethod(value) or inspect.isfunction(value):
            return lambda *args, **kwargs: self._result(value(*args, **kwargs))
        return value if isinstance(value, str) else Blocking(value, self._loop)

    def _result(self, value: Any) -> Any:
        if inspect.isasyncgen(value):
            return self._iterate(value)
        if inspect.isawaitable(value):
            return self._loop.run_until_complete(value)
        return Blocking(value, self._loop)

    def _iterate(self, values: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while (value := self._loop.run_until_complete(anext(values, None))) is not None:
                yield value
        finally:
            self._loop.run_until_complete(values.aclose())

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients, of each kind in turn."""
    if request.param == "Client":
        yield Client
        return
    with asyncio.Runner() as runner:
        yield lambda *args, **kwargs: Blocking(AsyncClient(*args, **kwargs), runner.get_loop())


@pytest.fixture
def client(service: FakeService, connect: Callable[..., Any]) -> Iterator[Client]:
    with connect(service.url, timeout=5.0) as client:
        yield client


@pytest.fixture
def faults() -> type[Fault]:
    return Fault


@pytest.fixture
def endless(service: FakeService) -> FakeService:
    """A service whose jobs never end by themselves."""
    service.script = ENDLESS
    return service


@pytest.fixture
def failing(service: FakeService) -> FakeService:
    """A service whose jobs run out of memory."""
    service.script = FAILURE
    return service
