"""How a runner starts a vLLM of its own for the stages that ask the teacher (`RECOUP_VLLM_IN_TURNS`).

It runs `recoup-server teacher`, which serves the recovery's own teacher from the environment of
`RECOUP_VLLM_PYTHON` and ends with all that it started: when it is told, when the runner's group is killed,
and when the runner is gone in whatever way. So a GPU has one of them at a time, vLLM or the runner's models.
"""

import socket
import sys
from pathlib import Path
from typing import Any

from recoup.schemas import CreateRecovery
from recoup_jobs.processes import bound
from recoup_jobs.settings import Settings
from recoup_jobs.sources import ModelFolder, read_config

REWRITES = 2
"""A rewrite may be so many times as long as an answer (`recoup_ml.answers.ROOM`)."""


def require_an_environment(settings: Settings) -> None:
    """Ends the process, with a sentence, where there is no vLLM to be started."""
    if settings.vllm_in_turns and settings.vllm_python is None:
        raise SystemExit(
            "RECOUP_VLLM_IN_TURNS is set and RECOUP_VLLM_PYTHON is not: make an environment of vLLM by "
            "`deploy/vllm/environment.sh FOLDER` and name its Python."
        )
    if settings.vllm_in_turns and settings.vllm_urls:
        raise SystemExit("RECOUP_VLLM_IN_TURNS and RECOUP_VLLM_URLS exclude each other; set one of them.")


def served_by(
    teacher: ModelFolder, request: CreateRecovery, settings: Settings, log_folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """URLs of the teacher's servers, and the command that serves there; none where they are there already."""
    if not settings.vllm_in_turns:
        return tuple(settings.vllm_urls), ()
    port = _free_port()
    words = ["--model", str(teacher.path), "--port", str(port), "--home", str(log_folder)]
    longest = _longest(read_config(teacher), request)
    words += ["--max-length", str(longest)] if longest else []
    command = bound([sys.executable, "-m", "recoup_server", "teacher", *words])
    return (f"http://127.0.0.1:{port}",), tuple(command)


def _longest(config: dict[str, Any], request: CreateRecovery) -> int | None:
    """The longest sequence that will be asked for: room for a longer one would be taken from the cache."""
    text = config.get("text_config") or {}
    most = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    needed = request.training.max_length + REWRITES * request.generation.max_new_tokens
    return min(most, needed) if isinstance(most, int) else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
