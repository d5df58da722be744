"""Child processes that end with their parent, and only then."""

import os
import signal
import subprocess
import sys

import pytest

from recoup_jobs.processes import kill_group

START = "import subprocess, sys, time; from recoup_jobs.processes import die_with_stdin; die_with_stdin(); "
GRANDCHILD = "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)"


@pytest.fixture
def start():
    """Starts Python code that dies with its standard input, in a group of its own."""
    started = []

    def start(code):
        command = [sys.executable, "-c", START + code]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.mark.parametrize("before", ["", "time.sleep(0.3); "], ids=["at once", "later"])
def test_a_child_whose_input_stays_open_exits_as_it_likes(start, before):
    child = start(before + "sys.exit(7)")
    assert child.wait(20) == 7
    assert child.stderr.read() == b""


def test_a_child_that_is_written_to_lives_on(start):
    child = start("time.sleep(0.5); sys.exit(7)")
    child.stdin.write(b"x" * 10_000)
    child.stdin.flush()
    assert child.wait(20) == 7


def test_a_group_that_is_killed_is_gone_when_that_is_said(start):
    child = start(GRANDCHILD)
    grandchild = int(child.stdout.readline())
    kill_group(child)
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)


def test_the_end_of_its_input_ends_a_child_and_all_that_it_started(start):
    child = start(GRANDCHILD)
    assert int(child.stdout.readline()) > 0
    child.stdin.close()
    assert child.wait(20) == -signal.SIGKILL
    assert child.stdout.read() == b""  # the grandchild held the other end of this pipe
