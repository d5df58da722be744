import socket
import threading
import time
from urllib.request import urlopen

import pytest

from recoup_worker.scrapes import showing_metrics


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_worker_shows_what_it_counted(port):
    with (
        showing_metrics(f"127.0.0.1:{port}"),
        urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        assert "# TYPE recoup_gpu_seconds_total counter" in answer.read().decode()
        assert answer.headers["content-type"].startswith("text/plain")


def test_a_worker_that_ends_waits_until_it_is_asked_once_more(port):
    with showing_metrics(f"127.0.0.1:{port}") as scrapes:
        late = threading.Timer(0.5, lambda: urlopen(f"http://127.0.0.1:{port}/metrics").close())
        late.start()
        began = time.monotonic()
        scrapes.wait_for_next(threading.Event())
        assert 0.4 < time.monotonic() - began < 30
        late.join()


def test_nobody_is_waited_for_where_nothing_is_shown():
    with showing_metrics(None) as scrapes:
        began = time.monotonic()
        scrapes.wait_for_next(threading.Event())
        assert time.monotonic() - began < 1
