"""Child processes that end with their parent, and parents that end their children.

On Linux the kernel tells (`PR_SET_PDEATHSIG`); elsewhere a child that was given a pipe as
its standard input ends when the other side of it is gone.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
GONE_SECONDS = 5.0


def bound(command: list[str]) -> list[str]:
    """The same command, started so that it ends when the thread that starts it does."""
    return [sys.executable, "-m", "recoup_jobs.processes", str(os.getpid()), *command]


def die_with_parent(parent: int | None = None) -> None:
    """Makes this process receive SIGKILL when the thread that started it ends; Linux only.

    `parent` is its process, if that is known: it may be gone already.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def die_with_stdin() -> None:
    """Ends this process's group when standard input, a pipe of the parent's, is closed.

    The thread that waits reads the descriptor: on the lock of `sys.stdin` the interpreter's end would abort.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            continue
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def stop_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM to the process, then, after the grace, SIGKILL to its whole group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_seconds)
    kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process of the group that `process` leads, and waits until they have let go.

    A process that is killed holds its memory, and a GPU's, until the kernel has cleared it away.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + GONE_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
