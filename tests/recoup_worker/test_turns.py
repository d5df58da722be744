"""A runner's own vLLM: with what it is started, and that nothing of it outlives the runner.

vLLM's environment is a stand-in whose Python behaves as vLLM's does from outside: its engine is a child.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.processes import kill_group
from recoup_jobs.settings import Settings
from recoup_jobs.sources import ModelFolder
from recoup_worker.turns import require_an_environment, served_by

STAND_IN = """#!{python}
import os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
if "-c" in sys.argv:
    print('{{"vllm": "0.33.0"}}')
    sys.exit()
if os.fork() == 0:
    open({note!r}, "w").write(str(os.getpid()))
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
RUNNER = """
import subprocess, sys
from pathlib import Path
from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.settings import Settings
from recoup_jobs.sources import ModelFolder
from recoup_worker.turns import served_by

root = Path(sys.argv[1])
asked = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="teacher"))
_, command = served_by(ModelFolder(root, root / "teacher"), asked, Settings(), root / "job")
subprocess.run(command, stdin=subprocess.DEVNULL)
"""


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 8192}')
    return ModelFolder(tmp_path, folder)


@pytest.fixture
def settings(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, note=str(tmp_path / "engine")))
    python.chmod(0o755)
    return Settings(home=tmp_path / "home", vllm_python=python, vllm_in_turns=True)


@pytest.fixture
def request_():
    return CreateRecovery(
        student=ModelRef(source="s"),
        teacher=ModelRef(source="teacher"),
        training={"max_length": 512},
        generation={"max_new_tokens": 100},
    )


@pytest.fixture
def runner(tmp_path, settings, teacher):
    """A process that has started its teacher, as a runner does, and the engine's number."""
    started = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(tmp_path)],
        env=os.environ | settings.environment(),
        start_new_session=True,
    )
    note = tmp_path / "engine"
    until = time.monotonic() + 60
    while not (note.exists() and note.read_text()):
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    yield started, int(note.read_text())
    kill_group(started)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def ends(pid):
    """Whether the process ends soon: the kernel takes a moment to carry out a SIGKILL."""
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_runner_that_is_killed_takes_its_teacher_along(runner):
    process, engine = runner
    assert is_alive(engine)
    os.kill(process.pid, signal.SIGKILL)
    assert ends(engine)


def test_the_end_of_a_runners_group_ends_its_teacher(runner):
    process, engine = runner
    kill_group(process)
    assert ends(engine)


def option(command, name):
    return command[command.index(name) + 1]


def test_a_teacher_is_served_with_room_for_what_is_asked_and_no_more(teacher, request_, settings, tmp_path):
    (url,), command = served_by(teacher, request_, settings, tmp_path / "job")
    assert url == f"http://127.0.0.1:{option(command, '--port')}"
    assert option(command, "--max-length") == "712"
    assert option(command, "--home") == str(tmp_path / "job")


def test_a_teacher_is_not_asked_for_more_than_it_takes(teacher, request_, settings, tmp_path):
    (teacher.path / "config.json").write_text('{"text_config": {"max_position_embeddings": 600}}')
    _, command = served_by(teacher, request_, settings, tmp_path)
    assert option(command, "--max-length") == "600"
    (teacher.path / "config.json").write_text("{}")
    assert "--max-length" not in served_by(teacher, request_, settings, tmp_path)[1]


def test_servers_that_are_there_are_asked_and_none_is_started(teacher, request_, tmp_path):
    settings = Settings(home=tmp_path, vllm_urls=["http://a:8000", "http://b:8000"])
    assert served_by(teacher, request_, settings, tmp_path) == (("http://a:8000", "http://b:8000"), ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vllm_python": None}, "RECOUP_VLLM_PYTHON is not"),
        ({"vllm_urls": ["http://a:8000"]}, "exclude each other"),
    ],
)
def test_a_worker_that_cannot_take_turns_says_so_at_its_start(settings, change, said):
    require_an_environment(settings)
    with pytest.raises(SystemExit, match=said):
        require_an_environment(settings.model_copy(update=change))
