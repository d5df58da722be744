"""What an unfinished stage leaves for whoever takes it up again: there whole after a crash, or not at all.

A file or folder is written aside, flushed to the disk, then renamed. Names that begin with a dot
are such drafts and mean nothing. A file that has its name is never written to again, only replaced.
All of it lies in one folder of the stage, `UNFINISHED`, which goes when the stage is committed.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

UNFINISHED = "unfinished"
"""The folder, inside that of a stage, which a successor may go on from."""


def place(target: Path, fill: Callable[[Path], object]) -> None:
    """Puts at `target` the file or folder that `fill` makes at the path it is given.

    Between an old folder and a new one there is a moment without either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        fill(aside)
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        if target.is_dir():
            shutil.rmtree(target)
        aside.rename(target)
        _flush(target.parent)
    finally:
        remove(aside)


def link(source: Path, target: Path) -> None:
    """The same file under a second name or, where the file system has none, a copy."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        _flush(target)


def remove(path: Path) -> None:
    """Takes away a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
