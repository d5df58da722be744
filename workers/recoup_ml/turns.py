"""A teacher's server that is there while it is asked, and gone before a model is loaded here.

One device is shared in turns: the run then carries a command (`Run.vllm_command`) that serves the teacher at
`Run.vllm_urls` for as long as it runs. What it serves with, and that nothing of it outlives this process, is
the business of whoever made the command. Where there is none, servers are there already.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2

from recoup_ml import models
from recoup_ml.errors import TeacherUnavailable
from recoup_ml.run import Audience, Interrupted, Run

LOOK_SECONDS = 1.0
STOP_SECONDS = 60.0
"""A server that has not ended by then, with all that it started, is killed."""


@contextmanager
def served(run: Run, audience: Audience) -> Iterator[None]:
    """While the block runs, the servers at `run.vllm_urls` are there.

    Raises:
        TeacherUnavailable: the command ended before they answered.
        Interrupted: the recovery is to stop, and they did not answer yet.
    """
    if not run.vllm_command:
        yield
        return
    models.release()
    with subprocess.Popen(run.vllm_command, stdin=subprocess.DEVNULL) as server:
        try:
            while not all(map(_is_well, run.vllm_urls)):
                if server.poll() is not None:
                    raise TeacherUnavailable(
                        f"The teacher's server ended with code {server.returncode} before it answered; the "
                        "runner's log says why."
                    )
                if audience.stopping():
                    raise Interrupted
                time.sleep(LOOK_SECONDS)
            yield
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    server.kill()


def _is_well(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx2.TransportError:
        return False
