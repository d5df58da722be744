"""The ledger as a recovery's journal: stages committed under the claim's epoch, progress, events, files.

A stage works in a folder of its own epoch. Only the ledger's fenced transaction makes that
folder the job's, so a runner that lost its claim can leave nothing behind that counts. What it
left of an unfinished stage, its successor takes over (`takeover.py`).
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from recoup.schemas import Progress, Stage
from recoup_jobs.artifacts import publish
from recoup_jobs.claims import Claim
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_ml.run import Interrupted
from recoup_worker.takeover import take_over

PROGRESS_SECONDS = 0.5


class LedgerJournal:
    """Keeps one claimed job's journal; see `recoup_ml.run.Journal`."""

    def __init__(self, ledger: Ledger, claim: Claim, settings: Settings, stopping: threading.Event) -> None:
        self._ledger, self._claim, self._settings = ledger, claim, settings
        self._stopping = stopping
        self._stage: Stage = "preflight"
        self._place = ""
        self._began = self._told = 0.0

    def stage(self, name: Stage, work: Callable[[Path], None]) -> Path:
        committed = self._ledger.committed(self._claim.job_id)
        if name in committed:
            return self._settings.stage_folder(committed[name])
        if self.stopping():
            raise Interrupted
        self._stage, self._began, self._told = name, time.monotonic(), 0.0
        self._ledger.enter_stage(self._claim, name)
        self._place = f"{self._claim.job_id}/e{self._claim.epoch}/{name}"
        folder = self._settings.stage_folder(self._place)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        take_over(self._settings.jobs_dir / self._claim.job_id, name, self._claim.epoch)
        work(folder)
        self._ledger.commit_stage(self._claim, name, self._place)
        return folder

    def stopping(self) -> bool:
        return self._stopping.is_set()

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tells how far the stage is, twice a second at most, and when it will end at the pace so far."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS and done < total:
            return
        self._told = now
        eta = (now - self._began) * (total - done) / done if done else None
        point = Progress(stage=self._stage, done=done, total=total, unit=unit, eta_seconds=eta)
        self._ledger.progress(self._claim, point)

    def metric(self, **values: str | float | int | bool | None) -> None:
        self._ledger.event(self._claim, "metric", values)

    def publish(self, files: dict[str, Path]) -> None:
        store, total = open_store(self._settings), len(files)
        publish(store, self._place, files, lambda done: self.progress(done, total, "files"))

    def stage_seconds(self) -> dict[str, float]:
        """Wall time between a stage's start and its commit, from the job's events."""
        started: dict[str, float] = {}
        seconds: dict[str, float] = {}
        after: int | None = 0
        while after is not None:
            page = self._ledger.events(self._claim.job_id, after, 1000)
            for event in page.data:
                if event.type == "stage" and event.data["status"] == "started":
                    started[event.data["stage"]] = event.at
                elif event.type == "stage":
                    seconds[event.data["stage"]] = event.at - started[event.data["stage"]]
            after = int(page.next_cursor) if page.has_more and page.next_cursor else None
        return seconds
