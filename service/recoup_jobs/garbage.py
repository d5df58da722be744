"""What nobody will read again: working folders of jobs that have ended, what they put into the artifact store
beside what they published, uploads that broke off.

A stage's folder counts only once the ledger names it. What a killed runner left beside that is
kept while the job may go on, because the next run may resume from it, and removed an hour after
the job's end. Committed stages stay where another job may have taken them over (`retry`), which is where the
job did not succeed.
"""

import shutil
import time
from pathlib import Path

from sqlalchemy import select, update

from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs import artifacts
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_jobs.tables import files, jobs, now, stages

KEPT_SECONDS = 3600.0
"""After a job's end."""
UPLOAD_SECONDS = 86_400.0
"""After so long without a row in the ledger, an upload has broken off."""
MOST_JOBS = 20
"""In one round, so that a round stays short."""


def collect(ledger: Ledger, settings: Settings) -> None:
    """One round. What cannot be removed now is tried again with the next."""
    for id, state in _uncleared(ledger):
        committed = _committed(ledger, id)
        _clear_job(settings.jobs_dir, id, set() if state == "succeeded" else committed)
        artifacts.collect(open_store(settings), id, sorted(committed))
        with ledger.engine.begin() as conn:
            conn.execute(update(jobs).where(jobs.c.id == id).values(cleared_at=now()))
    for path in _stray_uploads(ledger, settings.files_dir):
        path.unlink(missing_ok=True)


def _uncleared(ledger: Ledger) -> list[tuple[str, str]]:
    old = (jobs.c.state.in_(TERMINAL_STATES), jobs.c.finished_at < now() - KEPT_SECONDS)
    with ledger.reading() as conn:
        query = select(jobs.c.id, jobs.c.state).where(*old, jobs.c.cleared_at.is_(None))
        return [(job.id, job.state) for job in conn.execute(query.order_by(jobs.c.number).limit(MOST_JOBS))]


def _committed(ledger: Ledger, id: str) -> set[str]:
    """Below `jobs_dir`; by whichever job they are named."""
    with ledger.reading() as conn:
        return {*conn.execute(select(stages.c.folder).where(stages.c.folder.startswith(f"{id}/"))).scalars()}


def _clear_job(jobs_dir: Path, id: str, committed: set[str]) -> None:
    for epoch in (jobs_dir / id).glob("e*"):
        for folder in epoch.iterdir():
            if folder.relative_to(jobs_dir).as_posix() not in committed:
                shutil.rmtree(folder)
        if not any(epoch.iterdir()):
            epoch.rmdir()


def _stray_uploads(ledger: Ledger, files_dir: Path) -> list[Path]:
    old = time.time() - UPLOAD_SECONDS
    found = [path for path in files_dir.glob("*") if path.stat().st_mtime < old]
    with ledger.reading() as conn:
        known = {*conn.execute(select(files.c.id)).scalars()} if found else set()
    return [path for path in found if path.stem not in known]
