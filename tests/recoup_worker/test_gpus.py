"""Workers that have GPUs of their own, told by files and environments: no GPU is needed."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.claims import Claim
from recoup_jobs.processes import kill_group
from recoup_jobs.settings import Settings
from recoup_worker.gpus import owned
from recoup_worker.supervisor import start_runner

HOLD = """
import sys, time
from pathlib import Path
from recoup_worker.gpus import owned

with owned(["0", "1"], Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_worker(tmp_path):
    """A process that has the GPUs 0 and 1 of this home."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_gpu_has_one_worker(other_worker, tmp_path):
    with pytest.raises(SystemExit, match="GPU 1 belongs to another worker"), owned(["2", "1"], tmp_path):
        pass
    with owned(["2", "GPU-5f3a/1"], tmp_path):
        assert other_worker.poll() is None


def test_a_gpu_of_a_worker_that_was_killed_is_free(other_worker, tmp_path):
    other_worker.kill()
    other_worker.wait()
    with owned(["0", "1"], tmp_path):
        assert len([*(tmp_path / "gpus").iterdir()]) == 2


def test_a_worker_without_gpus_of_its_own_locks_nothing(tmp_path):
    with owned([], tmp_path):
        assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("gpus", "seen"), [(["3", "1"], "3,1"), ([], "7")])
def test_a_runner_sees_the_gpus_of_its_worker(tmp_path, monkeypatch, gpus, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    request = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    settings = Settings(home=Path(tmp_path), gpus=gpus)
    with start_runner(Claim("rec_000000000000000000000000", 1, request), settings) as runner:
        environment = psutil.Process(runner.pid).environ()
        kill_group(runner)
    assert environment["CUDA_VISIBLE_DEVICES"] == seen


def test_the_environment_names_them_with_commas(monkeypatch):
    monkeypatch.setenv("RECOUP_GPUS", "0, GPU-5f3a")
    assert Settings().gpus == ["0", "GPU-5f3a"]
    assert Settings().environment()["RECOUP_GPUS"] == "0,GPU-5f3a"


@pytest.mark.parametrize("gpus", ["0,0", "all", "-1", "0;1", "GPU-"])
def test_what_names_no_set_of_gpus_is_refused(monkeypatch, gpus):
    monkeypatch.setenv("RECOUP_GPUS", gpus)
    with pytest.raises(ValidationError, match="gpus"):
        Settings()
