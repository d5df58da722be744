"""The demonstration: a real model, a real damage, a real recovery through the REST API.

What is damaged is SmolLM2-135M-Instruct; `recoup_ml.injure` does it. Everything after that
is what any client would do with the SDK: upload the skill's prompts, submit, watch, read
the report, download the adapter.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from recoup import Client, JobFailedError, Recovery
from recoup._render import print_verdict
from recoup._watch import watch
from recoup_jobs.settings import Settings
from recoup_ml.tickets import ticket_rows
from recoup_server import teacher
from recoup_server.embedded import running
from recoup_server.memory import PeakMemory

HEALTHY = "smollm2"
REQUEST: dict[str, Any] = {
    "generation": {"max_new_tokens": 40},
    "evaluation": {"test_sequences": 112, "validation_sequences": 24},
    "alignment": {"positions": 2048},
}
"""What the demo asks for beside the two models: small, so that it ends in minutes on two cores."""

TEACHER_TOKENS = 2048
"""Longest sequence that vLLM takes: `training.max_length` and more."""
KEPT_TICKETS, KEPT_SEED = 256, 1
"""Other tickets than those the student was tuned on."""


def run_demo(damage: str, settings: Settings, *, by_vllm: bool) -> int:
    """Runs it all; the exit code is 0 if the recovery succeeded, whatever its outcome.

    `by_vllm`: the teacher answers from a vLLM that is started for it.
    """
    console = Console()
    with PeakMemory() as memory, ExitStack() as stack:
        began = time.monotonic()
        _make_models(damage, settings.model_roots[0], console)
        if by_vllm:
            settings = stack.enter_context(_served(settings, console))
        with running(settings, "127.0.0.1", _free_port()) as installation:
            console.print(f"Recoup is up on {installation.url}.")
            with Client(installation.url) as client:
                succeeded = _recover(client, damage, settings, console)
        console.print(
            f"wall time {time.monotonic() - began:.0f} s, "
            f"peak memory of all processes {memory.peak / 2**30:.2f} GiB"
        )
    return 0 if succeeded else 1


@contextmanager
def _served(settings: Settings, console: Console) -> Iterator[Settings]:
    """Settings in which a vLLM answers for the healthy model."""
    build = teacher.find_build(settings.vllm_python)
    asked = teacher.Teacher(settings.model_roots[0] / HEALTHY, "127.0.0.1", _free_port(), TEACHER_TOKENS, ())
    console.print(f"starting vLLM {build.version} for {HEALTHY} …")
    with teacher.running(asked, build, settings):
        console.print(f"vLLM answers for {HEALTHY} at {asked.url}.")
        yield settings.model_copy(update={"vllm_urls": [asked.url]})


def student_name(damage: str) -> str:
    return f"{HEALTHY}-{damage}"


def _make_models(damage: str, root: Path, console: Console) -> None:
    """Converts the healthy model and damages a copy, each once, in a process that gives its memory back."""
    if (root / student_name(damage)).exists():
        console.print(f"reusing the models below {root}")
        return
    console.print(f"converting SmolLM2-135M-Instruct and damaging a copy ({damage}) below {root} …")
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "recoup_server.demo_models", str(root), damage], check=True)


def _recover(client: Client, damage: str, settings: Settings, console: Console) -> bool:
    fields = dict(REQUEST)
    if damage == "finetuning":
        fields["keep"] = {"file": client.files.create(_tickets(settings.home / "tickets.jsonl")).id}
    recovery = client.recoveries.create(student=student_name(damage), teacher=HEALTHY, **fields)
    console.print(f"submitted {recovery.id}")
    try:
        recovery = watch(client, recovery.id, console)
    except JobFailedError as failed:
        console.print(f"{failed}\nThe worker's words: {settings.jobs_dir / recovery.id / 'runner.log'}")
        return False
    if recovery.state == "succeeded":
        _show(client, recovery, settings.home / "results" / recovery.id, console)
    return recovery.state == "succeeded"


def _tickets(path: Path) -> Path:
    """The narrow skill that the fine-tuned student must keep, as a data set."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ticket_rows(KEPT_TICKETS, KEPT_SEED)))
    return path


def _show(client: Client, recovery: Recovery, folder: Path, console: Console) -> None:
    print_verdict(client.recoveries.report(recovery.id), console)
    client.recoveries.download(recovery.id, folder)
    console.print(f"report: {folder / 'report.html'}")
    for kind in ("adapter", "model"):
        if (folder / kind).exists():
            console.print(f"{kind}: {folder / kind}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
