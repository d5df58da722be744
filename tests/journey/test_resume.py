"""A runner that is killed or told to stop, and its successor: together they do what one alone does."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recoup.schemas import CreateRecovery, Report
from recoup_jobs.artifacts import Published, open_artifact, open_published
from recoup_jobs.claims import Claim
from recoup_jobs.ledger import Ledger, open_ledger
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_worker import exits
from recoup_worker.supervisor import start_runner

STEPS = 60
ASKED = {
    "student": {"source": "student"},
    "teacher": {"source": "teacher"},
    "generation": {"max_new_tokens": 8},
    "training": {"steps": STEPS, "batch_size": 4, "learning_rate": 0.01, "stop_early": False},
    "evaluation": {
        "test_sequences": 16,
        "validation_sequences": 8,
        "baselines": False,
        "gate": {"max_regression": 1.0},
    },
    "alignment": {"positions": 256},
}


@dataclass(frozen=True)
class Job:
    """A recovery in a home of its own, which is run by hand."""

    id: str
    ledger: Ledger
    settings: Settings

    def claim(self) -> Claim:
        claim = self.ledger.claim("test", [self.settings.queue], 600)
        assert claim is not None
        return claim

    def run(self) -> int:
        """Runs it to its end; the runner's exit code."""
        return _ended(start_runner(self.claim(), self.settings))

    def interrupt(self, number: int, cancel: bool = False) -> int:
        """Runs it until it trains and a validation is behind it, then sends a signal; the exit code."""
        claim = self.claim()
        runner = start_runner(claim, self.settings)
        while not self._told(claim.epoch, "validation") or len(self.steps(claim.epoch)) < 8:
            assert runner.poll() is None
            time.sleep(0.01)
        if cancel:
            self.ledger.cancel(self.id)
        runner.send_signal(number)
        code = _ended(runner)
        (self.ledger.release if code == exits.STOPPED else self.ledger.lose)(claim)
        return code

    def steps(self, epoch: int) -> list[int]:
        return [data["step"] for data in self._told(epoch, "train")]

    @property
    def published(self) -> Published:
        return open_published(open_store(self.settings), self.ledger.committed(self.id)["package"])

    def artifact(self, path: str) -> bytes:
        return open_artifact(self.published, path).read_bytes()

    @property
    def training(self) -> dict[str, Any]:
        """All that the report says of the training, times aside."""
        report = Report.model_validate_json(self.artifact("report.json"))
        assert report.training is not None
        return report.training.model_dump(exclude={"phases": {"__all__": {"seconds"}}})

    def _told(self, epoch: int, name: str) -> list[dict[str, Any]]:
        events = self.ledger.events(self.id, 0, 1000).data
        return [
            event.data
            for event in events
            if (event.epoch, event.type) == (epoch, "metric") and event.data["name"] == name
        ]


def _ended(runner: subprocess.Popen[bytes]) -> int:
    with runner:
        return runner.wait(240)


@pytest.fixture(scope="module")
def job(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Job]]:
    opened: list[Ledger] = []

    def make() -> Job:
        settings = Settings(home=tmp_path_factory.mktemp("home"), model_roots=[models])
        opened.append(open_ledger(settings))
        asked = CreateRecovery.model_validate(ASKED)
        return Job(opened[-1].create(asked, settings.queue).id, opened[-1], settings)

    yield make
    for ledger in opened:
        ledger.close()


@pytest.fixture(scope="module")
def undisturbed(job: Callable[[], Job]) -> Job:
    whole = job()
    assert whole.run() == exits.ENDED
    assert whole.steps(1) == list(range(1, STEPS + 1))
    return whole


@pytest.mark.slow
def test_a_stopped_and_a_killed_runner_and_their_successor_end_in_the_bits_of_one(
    job: Callable[[], Job], undisturbed: Job
) -> None:
    ended = job()
    assert ended.interrupt(signal.SIGTERM) == exits.STOPPED
    assert ended.interrupt(signal.SIGKILL) == -signal.SIGKILL
    assert ended.run() == exits.ENDED
    stopped, killed, last = (ended.steps(epoch) for epoch in (1, 2, 3))
    assert killed[0] == stopped[-1] + 1
    assert killed[0] < last[0] <= killed[-1] + 1
    assert last[-1] == STEPS
    assert ended.training == undisturbed.training
    weights = "adapter/adapter_model.safetensors"
    assert ended.artifact(weights) == undisturbed.artifact(weights)


def test_a_cancelled_recovery_hands_its_best_checkpoint_over(job: Callable[[], Job]) -> None:
    cancelled = job()
    assert cancelled.interrupt(signal.SIGTERM, cancel=True) == exits.STOPPED
    assert cancelled.ledger.get(cancelled.id).state == "cancelled"
    names = {artifact.path for artifact in cancelled.published.artifacts}
    assert names == {"checkpoint/adapter_config.json", "checkpoint/adapter_model.safetensors"}
    config = json.loads(cancelled.artifact("checkpoint/adapter_config.json"))
    assert config["base_model_name_or_path"] == "student"
