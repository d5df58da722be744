"""A worker's metrics, for Prometheus to fetch, on a port of the internal network."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import generate_latest

from recoup_jobs.metrics import CONTENT_TYPE, REGISTRY

LAST_LOOK_SECONDS, POLL_SECONDS = 45.0, 0.2
"""A worker that ends waits so long to be asked for the last time: three of Prometheus' usual intervals."""


class Scrapes:
    """Knows whether anybody asks, and has asked since."""

    def __init__(self, expected: bool) -> None:
        self._expected = expected
        self._asked = threading.Event()

    def heard(self) -> None:
        self._asked.set()

    def wait_for_next(self, stopping: threading.Event) -> None:
        """Until somebody asks once more, so that what was counted last is known; not for ever."""
        self._asked.clear()
        until = time.monotonic() + LAST_LOOK_SECONDS
        while self._expected and not stopping.is_set() and time.monotonic() < until:
            if self._asked.wait(POLL_SECONDS):
                return


@contextmanager
def showing_metrics(listen: str | None) -> Iterator[Scrapes]:
    """Serves `GET /metrics` at `address:port` while the block runs; nothing where there is no address."""
    scrapes = Scrapes(expected=listen is not None)
    if listen is None:
        yield scrapes
        return
    address, _, port = listen.rpartition(":")
    server = ThreadingHTTPServer((address.strip("[]"), int(port)), _handler(scrapes))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield scrapes
    finally:
        server.shutdown()
        server.server_close()


def _handler(scrapes: Scrapes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                return self.send_error(404)
            text = generate_latest(REGISTRY)
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            scrapes.heard()
            return None

        def log_message(self, format: str, *args: object) -> None:
            """Being asked every few seconds is no news."""

    return Handler
