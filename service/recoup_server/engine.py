"""The local engine on demand: started while a deployment is wanted, stopped when none is.

It holds a model in memory, and an installation that only recovers needs none for serving. So nobody starts
it but the first deployment; one that dies is started again.
"""

import logging
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from recoup_jobs.database import AWAY
from recoup_jobs.deployments import Deployments
from recoup_jobs.ledger import open_ledger
from recoup_jobs.replica import SOCKET
from recoup_jobs.settings import Settings

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 5.0
"""From the end of an engine that died to the start of the next."""

Start = Callable[[list[str]], AbstractContextManager[subprocess.Popen[bytes]]]
"""Runs `recoup-server` with these arguments as a child."""

log = logging.getLogger(__name__)


@contextmanager
def socket_of_engine(settings: Settings) -> Iterator[Settings]:
    """Settings in which deployments go to the local engine, where they name no other servers.

    A socket's path may have 108 bytes at most, so it cannot lie below an arbitrary home.
    """
    if settings.serve_urls:
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="recoup-") as runtime:
        yield settings.model_copy(update={"serve_urls": [f"{SOCKET}{runtime}/engine.sock"]})


@contextmanager
def engine_on_demand(settings: Settings, start: Start) -> Iterator[None]:
    """Keeps the engine while there is something for it to serve, for as long as the block runs."""
    sockets = [url.removeprefix(SOCKET) for url in settings.serve_urls if url.startswith(SOCKET)]
    if not sockets:
        yield
        return
    stopping = threading.Event()
    keeper = threading.Thread(
        target=_keep, args=(settings, Path(sockets[0]), start, stopping), name="engine", daemon=True
    )
    keeper.start()
    try:
        yield
    finally:
        stopping.set()
        keeper.join()


def _keep(settings: Settings, socket: Path, start: Start, stopping: threading.Event) -> None:
    ledger = open_ledger(settings)
    deployments = Deployments(ledger, settings.serve_urls)
    with ExitStack() as child:
        engine: subprocess.Popen[bytes] | None = None
        while not stopping.wait(LOOK_SECONDS):
            try:
                wanted = bool(deployments.wanted())
            except AWAY as outage:
                log.warning("whether an engine is wanted cannot be told now: %s", outage)
                continue
            if engine is not None and (not wanted or engine.poll() is not None):
                died, engine = engine.poll(), None
                child.close()
                if died is not None:
                    log.warning("the engine ended with code %s; see engine.log", died)
                    stopping.wait(AGAIN_SECONDS)
            elif engine is None and wanted:
                engine = child.enter_context(start(["engine", "--socket", str(socket)]))
    ledger.close()
