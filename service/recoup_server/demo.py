"""The demonstration: a real model, a real damage, a real recovery through the REST API, and an answer.

What is damaged is SmolLM2-135M-Instruct; `recoup_ml.injure` does it. Everything after that
is what any client would do: upload the skill's prompts, submit, watch, read the report, download the adapter,
deploy it, and ask it by the openai package, which knows nothing of Recoup.
"""

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from pydantic import SecretStr
from rich.console import Console

from recoup import Client, DeploymentFailedError, JobFailedError, Recovery, WaitTimeoutError
from recoup._render import print_verdict
from recoup._watch import watch
from recoup.schemas import HANDED_OVER
from recoup_jobs.settings import Settings
from recoup_ml.tickets import ticket_rows
from recoup_server import teacher
from recoup_server.embedded import running
from recoup_server.memory import PeakMemory

HEALTHY = "smollm2"
DEPLOYED = "smollm2-recovered"
QUESTION = "What is the capital of France?"
MOST_RANK = 64
"""Of the demo's adapters."""
LIVE_SECONDS = 600.0
REQUEST: dict[str, Any] = {
    "generation": {"max_new_tokens": 40},
    "evaluation": {"test_sequences": 112, "validation_sequences": 24},
    "alignment": {"positions": 2048},
}
"""What the demo asks for beside the two models: small, so that it ends in minutes on two cores."""

TEACHER_TOKENS = 2048
"""Longest sequence that vLLM takes: `training.max_length` and more."""
MADE_HERE = {"made_by": "recoup-server demo"}
"""Tells the demo's recoveries from others in the same home."""
KEPT_TICKETS, KEPT_SEED = 256, 1
"""Other tickets than those the student was tuned on."""


def run_demo(damage: str, settings: Settings, *, by_vllm: bool) -> int:
    """Runs it all; the exit code is 0 if the recovery succeeded, whatever its outcome.

    `by_vllm`: the teacher answers from a vLLM that is started for it.
    """
    console = Console()
    with PeakMemory() as memory, ExitStack() as teaching:
        began = time.monotonic()
        _make_models(damage, settings.model_roots[0], console)
        student = _student(damage, settings)
        key = secrets.token_urlsafe(32)  # the openai package wants one, whatever the server asks for
        settings = settings.model_copy(update={"api_key": SecretStr(key)})
        if by_vllm:
            settings = teaching.enter_context(_served(settings, console))
            settings = settings.model_copy(update={"serve_urls": [student.url]})
        with running(settings, "127.0.0.1", _free_port()) as installation:
            console.print(f"Recoup is up on {installation.url}.")
            with Client(installation.url, key) as client:
                recovery = _recover(client, damage, settings, console)
                teaching.close()
                succeeded = recovery is not None and (
                    recovery.outcome not in HANDED_OVER
                    or _deploy(client, recovery, student if by_vllm else None, settings, console)
                )
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


def _student(damage: str, settings: Settings) -> teacher.Teacher:
    """A vLLM of the damaged model with room for an adapter."""
    folder = settings.model_roots[0] / student_name(damage)
    flags = ("--enable-lora", "--max-lora-rank", str(MOST_RANK))
    return teacher.Teacher(folder, "127.0.0.1", _free_port(), TEACHER_TOKENS, flags)


def _deploy(
    client: Client,
    recovery: Recovery,
    student: teacher.Teacher | None,
    settings: Settings,
    console: Console,
) -> bool:
    """Serves what was recovered, from `student` or else from the local engine, and asks it something."""
    with ExitStack() as serving:
        if student is not None:
            build = teacher.find_build(settings.vllm_python)
            console.print(f"starting vLLM {build.version} for {student.model.name} …")
            serving.enter_context(teacher.running(student, build, settings))
        deployment = client.deployments.create(recovery.id, name=DEPLOYED)
        try:
            deployment = client.deployments.wait(deployment.id, timeout=LIVE_SECONDS)
        except (DeploymentFailedError, WaitTimeoutError) as failed:
            console.print(str(failed))
            return False
        console.print(f"{deployment.id} is live as {DEPLOYED}: its effect on the server is that of training.")
        key = settings.api_key.get_secret_value() if settings.api_key else None
        with OpenAI(base_url=f"{client.base_url}/v1", api_key=key) as openai:
            asked = [{"role": "user", "content": QUESTION}]
            answer = openai.chat.completions.create(
                model=DEPLOYED, messages=asked, max_tokens=40, temperature=0
            )
        console.print(
            f"asked by the openai package: {QUESTION}\nanswered: {answer.choices[0].message.content}"
        )
        client.deployments.delete(deployment.id)
    _invite(recovery, settings, console)
    return True


def _invite(recovery: Recovery, settings: Settings, console: Console) -> None:
    """How to go on with what was recovered: the demo takes everything down that it started."""
    here = Path(sys.executable).parent
    lines = [
        "serve it again, and talk to it in another terminal:",
        f"  {here / 'recoup-server'} up --home {settings.home}",
        f"  {here / 'recoup'} deploy {recovery.id} --name {DEPLOYED}",
        f"  {here / 'recoup'} chat {DEPLOYED} '{QUESTION}'",
    ]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


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


def _recover(client: Client, damage: str, settings: Settings, console: Console) -> Recovery | None:
    """The recovery, if it succeeded."""
    fields = dict(REQUEST)
    if damage == "finetuning":
        fields["keep"] = {"file": client.files.create(_tickets(settings.home / "tickets.jsonl")).id}
    _cancel_leftovers(client)
    recovery = client.recoveries.create(
        student=student_name(damage), teacher=HEALTHY, metadata=MADE_HERE, **fields
    )
    console.print(f"submitted {recovery.id}")
    try:
        recovery = watch(client, recovery.id, console)
    except JobFailedError as failed:
        console.print(f"{failed}\nThe worker's words: {settings.jobs_dir / recovery.id / 'runner.log'}")
        return None
    if recovery.state != "succeeded":
        return None
    _show(client, recovery, settings.home / "results" / recovery.id, console)
    return recovery


def _cancel_leftovers(client: Client) -> None:
    """What a demo that was broken off left in this home: this one would wait behind it."""
    for state in ("queued", "running", "paused"):
        for job in client.recoveries.list(state=state, metadata=MADE_HERE):
            client.recoveries.cancel(job.id)


def _tickets(path: Path) -> Path:
    """The narrow skill that the fine-tuned student must keep, as a data set."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ticket_rows(KEPT_TICKETS, KEPT_SEED)))
    return path


def _show(client: Client, recovery: Recovery, folder: Path, console: Console) -> None:
    print_verdict(client.recoveries.report(recovery.id), console)
    client.recoveries.download(recovery.id, folder)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    for kind in ("adapter", "model"):
        if (folder / kind).exists():
            console.print(f"{kind}: {folder / kind}", soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
