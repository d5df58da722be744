"""Files that survive a power cut: written aside, flushed to disk, then renamed into place.

A rename is atomic, but only what was flushed before it is sure to be there after it; the
folder that holds the name has to be flushed too.
"""

import hashlib
import os
from pathlib import Path

CHUNK = 1 << 20


def copy(source: Path, target: Path) -> tuple[int, str]:
    """Copies bytes to the disk; answers their number and their sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as bytes_in, target.open("xb") as bytes_out:
        while chunk := bytes_in.read(CHUNK):
            digest.update(chunk)
            bytes_out.write(chunk)
        bytes_out.flush()
        os.fsync(bytes_out.fileno())
        return bytes_out.tell(), digest.hexdigest()


def write(target: Path, content: bytes) -> None:
    with target.open("xb") as bytes_out:
        bytes_out.write(content)
        bytes_out.flush()
        os.fsync(bytes_out.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
