"""A job's artifacts as files of a folder: complete and verified, or not there.

A file is written aside, compared with the size and SHA-256 of its manifest entry, and only
then renamed to its place. A file that is already there with that hash is not fetched again.
What was written when a connection broke stays aside, under a name that holds the hash it
shall have; the rest is asked for by `Range`, in the same download or in the next one.
"""

from __future__ import annotations

import hashlib
from functools import partial
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from recoup import _calls
from recoup._flow import Flow, Head, Read, Run, Sleep, Unanswered
from recoup._follow import PATIENCE, Outage, everything
from recoup._sending import opened
from recoup.errors import APIStatusError, ChecksumError, UnsafePathError

if TYPE_CHECKING:
    from recoup.schemas import Artifact


def download(id: str, folder: str | PathLike[str]) -> Flow[list[Path]]:
    """Fetch all artifacts into the folder and verify each; files that are already right stay.

    Outlives broken connections and a restart of the server. Raises UnsafePathError before
    anything is written, ChecksumError on a file that did not arrive as its manifest says.
    """
    artifacts = yield from everything(_calls.list_artifacts(id))
    targets = [place(Path(folder), artifact) for artifact in artifacts]
    for artifact, target in zip(artifacts, targets, strict=True):
        yield from _fetch(id, artifact, target)
    return targets


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


def _fetch(id: str, artifact: Artifact, target: Path) -> Flow[None]:
    """One file into its place. A part that was left behind and turns out wrong is not trusted twice."""
    if (yield Run(partial(is_complete, target, artifact))):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{artifact.sha256[:12]}.part")
    for _ in range(2 if aside.exists() else 1):
        yield from _fill(id, artifact, aside)
        if (yield Run(partial(is_complete, aside, artifact))):
            aside.replace(target)
            return
        aside.unlink()
    raise ChecksumError(
        f"{artifact.path} did not arrive as the manifest describes it "
        f"({artifact.size} bytes, sha256 {artifact.sha256}); it was not kept."
    )


def _fill(id: str, artifact: Artifact, aside: Path) -> Flow[None]:
    """Append what is missing, through broken connections."""
    outage = Outage(patience=PATIENCE)
    aside.touch()
    while (start := aside.stat().st_size) < artifact.size:
        try:
            head = yield from opened(_calls.get_artifact(id, artifact.path, start))
            yield from _append(head, aside, artifact.size, outage)
            return
        except (Unanswered, APIStatusError) as failed:
            yield Sleep(outage.pause(failed))


def _append(head: Head, aside: Path, size: int, outage: Outage) -> Flow[None]:
    """Write what comes, but stop once it is more than it may be."""
    with aside.open("ab" if head.status == 206 else "wb") as file:
        while chunk := (yield Read()):
            outage.over()
            file.write(chunk)
            if file.tell() > size:
                return
