"""A job's artifacts as files of a folder: complete and verified, or not there.

A file is written aside, compared with the size and SHA-256 of its manifest entry, and
only then renamed to its place. A file that is already there with that hash is not
fetched again, so a download that broke off is resumed by starting it again.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from recoup.errors import ChecksumError, UnsafePathError
from recoup.schemas import Artifact


def place(folder: Path, artifact: Artifact) -> Path:
    """Where the artifact goes below the folder. Raises UnsafePathError if its path leads elsewhere.

    Links inside the folder are followed before judging: one that points out is refused too.
    """
    path = PurePosixPath(artifact.path)
    windows = set(artifact.path) & set("\\:\0")
    inside = path.parts and ".." not in path.parts and not windows
    target = folder.joinpath(*path.parts)
    if not inside or not target.resolve().is_relative_to(folder.resolve()):
        raise UnsafePathError(f"The server names an artifact {artifact.path!r}, which would leave {folder}.")
    return target


def is_complete(target: Path, artifact: Artifact) -> bool:
    """Whether the file is there, with the manifest's size and hash."""
    if not target.is_file() or target.stat().st_size != artifact.size:
        return False
    with target.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == artifact.sha256


def save(chunks: Iterable[bytes], target: Path, artifact: Artifact) -> Path:
    """Write the chunks to the target. Raises ChecksumError, keeping nothing, if they are not the artifact."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    aside.unlink(missing_ok=True)
    try:
        _write(chunks, aside, artifact.size)
        if not is_complete(aside, artifact):
            raise ChecksumError(
                f"{artifact.path} did not arrive as the manifest describes it "
                f"({artifact.size} bytes, sha256 {artifact.sha256}); it was not kept."
            )
        return aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _write(chunks: Iterable[bytes], path: Path, size: int) -> None:
    """Write the chunks, but stop once they are more than they may be."""
    written = 0
    with path.open("xb") as file:
        for chunk in chunks:
            written += file.write(chunk)
            if written > size:
                return
