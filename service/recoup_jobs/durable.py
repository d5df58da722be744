"""Files that survive a power cut: written aside, flushed to disk, then renamed into place.

A rename is atomic, but only what was flushed before it is sure to be there after it; the
folder that holds the name has to be flushed too.
"""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20


def copy(content: BinaryIO, target: Path) -> None:
    """Copies all bytes from where `content` stands to a new file on the disk."""
    with target.open("xb") as bytes_out:
        shutil.copyfileobj(content, bytes_out, CHUNK)
        bytes_out.flush()
        os.fsync(bytes_out.fileno())


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
