"""A real installation on loopback: Valkey, API and a worker process, driven by the SDK alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recoup import Client
from recoup_jobs.settings import Settings
from recoup_server.embedded import running

WORDS = [f"w{number}" for number in range(120)]
"""What the tiny models know."""
KINDS = ("add", "name", "sort", "find", "tell")


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), lease_seconds=5, grace_seconds=5)


@pytest.fixture(scope="session")
def client(settings: Settings, lasting_port: int) -> Iterator[Client]:
    with running(settings, "127.0.0.1", lasting_port) as installation, Client(installation.url) as client:
        yield client


@pytest.fixture(scope="session")
def models(settings: Settings, write_tiny_models: Callable[[Path], Path]) -> Path:
    """The folder of two tiny models, `teacher` and `student`."""
    return write_tiny_models(settings.model_roots[0])


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes so many prompts of five kinds as a data set."""

    def write(count: int) -> Path:
        rows = [
            {"prompt": f"{WORDS[at % 120]} {WORDS[at * 7 % 120]} {WORDS[at // 120]}", "kind": KINDS[at % 5]}
            for at in range(count)
        ]
        path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write
