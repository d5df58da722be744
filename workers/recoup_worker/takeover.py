"""What an earlier holder of a job left of a stage that it did not finish, taken over.

Every claim writes into the folder of its own epoch and into no other. What may be gone on from lies
there in `<stage>/unfinished`, in files that are never changed, only replaced as a whole. A successor
links them into its own epoch, so that an earlier holder, should it still be alive, can replace its own
and harm nothing. It may be replacing them just now: the same files before and after the linking
mean that what was linked stood there together at one moment, as a crash would have left it.
"""

import logging
import shutil
import time
from pathlib import Path

from recoup.schemas import Stage
from recoup_jobs import durable
from recoup_ml.durable import UNFINISHED, link

TRIES, PAUSE_SECONDS = 50, 0.1
"""How often, at most, an earlier holder that is still writing is waited for."""

log = logging.getLogger(__name__)


def take_over(job: Path, stage: Stage, epoch: int) -> None:
    """Makes the newest `unfinished` of an earlier epoch that of `epoch`, and removes the earlier ones."""
    target = job / f"e{epoch}" / stage / UNFINISHED
    for _ in range(TRIES):
        left = _left(job, stage, epoch)
        if not left:
            return
        if _linked(left[0], target):
            for older in left:
                shutil.rmtree(older, ignore_errors=True)
            return
        time.sleep(PAUSE_SECONDS)
    log.warning("%s: what was left of %s kept changing; it starts from its beginning", job.name, stage)


def _left(job: Path, stage: Stage, epoch: int) -> list[Path]:
    """What earlier epochs left, the latest first."""
    epochs = sorted((int(folder.name[1:]) for folder in job.glob("e[0-9]*")), reverse=True)
    folders = (job / f"e{earlier}" / stage / UNFINISHED for earlier in epochs if earlier < epoch)
    return [folder for folder in folders if folder.is_dir()]


def _linked(source: Path, target: Path) -> bool:
    """Whether all that `source` held at one moment is now `target`; it is there whole or not at all."""
    aside = target.with_name(f".{UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        before = _files(source)
        for path in before:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            link(source / path, aside / path)
        if _files(source) != before:
            return False
    except FileNotFoundError:
        return False
    aside.mkdir(parents=True, exist_ok=True)
    for folder in {aside, *(path.parent for path in aside.rglob("*"))}:
        durable.sync_folder(folder)
    aside.rename(target)
    durable.sync_folder(target.parent)
    return True


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What is not a draft, with what tells a file from another of its name."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    whole = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    stats = {path: (folder / path).stat() for path in whole if not (folder / path).is_dir()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}
