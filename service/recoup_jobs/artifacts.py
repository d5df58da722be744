"""What a recovery hands over: files, and the manifest that names them with their hashes.

Content lies in a store (`stores.py`) under its own sha256, `<job>/content/<sha256>`, so that no attempt can
overwrite what another published. The manifest of an attempt, `<job>/e<epoch>/package/manifest.json`, is put
last, and becomes the job's when the ledger commits that stage: a reader sees all files or none. Nothing is
served that the manifest does not name, and nothing is published whose format can carry code, but for the
script that Recoup itself writes. Whoever reads a file to its end gets what its hash says, or an error before
the last part.
"""

import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from recoup.schemas import Artifact
from recoup_jobs import durable
from recoup_jobs.errors import CorruptArtifact, NotFound
from recoup_jobs.stores import Store

LARGEST_MANIFEST = 16 << 20
SUFFIXES = frozenset(
    {".safetensors", ".json", ".jsonl", ".txt", ".md", ".html", ".svg", ".png", ".csv", ".jinja", ".model"}
)
RECIPE = "recipe.py"
"""The script that repeats a training."""
PLAIN_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*")

Manifest = TypeAdapter(list[Artifact])


@dataclass(frozen=True)
class Published:
    """What one package stage handed over."""

    store: Store
    job_id: str
    artifacts: Sequence[Artifact]


@dataclass(frozen=True)
class OpenArtifact:
    """One published file, to be read."""

    artifact: Artifact
    store: Store
    name: str

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`; all of them are checked against the hash.

        Raises `CorruptArtifact`, before the last part, where the store does not hold what was published.
        """
        stop = self.artifact.size if stop is None else stop
        digest, missing, held = hashlib.sha256(), stop - start, b""
        for part in self._stored(start, stop):
            if held:
                yield held
            digest.update(part)
            missing -= len(part)
            held = part
        whole = (start, stop) == (0, self.artifact.size)
        if missing or (whole and digest.hexdigest() != self.artifact.sha256):
            raise _corrupt(self.artifact)
        if held:
            yield held

    def read_bytes(self) -> bytes:
        return b"".join(self.parts())

    def _stored(self, start: int, stop: int) -> Iterator[bytes]:
        try:
            yield from self.store.read(self.name, start, stop)
        except FileNotFoundError:
            raise _corrupt(self.artifact) from None


def publish(
    store: Store, place: str, files: Mapping[str, Path], tell: Callable[[int], None] = lambda _: None
) -> list[Artifact]:
    """Makes `files` (path -> source) what the stage at `place`, `<job>/e<epoch>/<stage>`, hands over.

    `tell` hears how many are put, after each. Raises `ValueError` for a path that is not plain and for
    a format that is not served; then nothing is put.
    """
    for path in files:
        _check_path(path)
    published = []
    for path, source in sorted(files.items()):
        published.append(_put(store, _job_of(place), path, source))
        tell(len(published))
    store.put(manifest_name(place), io.BytesIO(Manifest.dump_json(published, indent=1)))
    return published


def open_published(store: Store, place: str) -> Published:
    """What the stage at `place` published; raises `NotFound` where that is nothing."""
    try:
        manifest = b"".join(store.read(manifest_name(place), 0, LARGEST_MANIFEST))
    except FileNotFoundError:
        raise NotFound("no_artifacts", "this recovery published no artifacts") from None
    return Published(store, _job_of(place), Manifest.validate_json(manifest))


def open_artifact(published: Published, path: str) -> OpenArtifact:
    """The published file of this path; raises `NotFound` for all that the manifest does not name."""
    for artifact in published.artifacts:
        if artifact.path == path:
            return OpenArtifact(artifact, published.store, content_name(published.job_id, artifact))
    raise NotFound("artifact_not_found", "the manifest of this recovery names no such artifact")


def save(published: Published, prefix: str, folder: Path) -> None:
    """Writes what was published below `prefix/` into a new folder, for programs that want files; all checked.

    The folder is there whole or not at all.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    durable.make_folder(aside)
    try:
        for artifact in published.artifacts:
            if artifact.path.startswith(f"{prefix}/"):
                _save(
                    open_artifact(published, artifact.path), aside / artifact.path.removeprefix(f"{prefix}/")
                )
        aside.rename(folder)
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def collect(store: Store, job_id: str, places: Sequence[str]) -> None:
    """Removes what a job that has ended left in the store beside what the stages at `places` published."""
    names = set(store.names(job_id))
    kept = {manifest_name(place) for place in places} & names
    for place in [place for place in places if manifest_name(place) in kept]:
        kept |= {content_name(job_id, artifact) for artifact in open_published(store, place).artifacts}
    store.remove(sorted(names - kept))


def manifest_name(place: str) -> str:
    return f"{place}/manifest.json"


def content_name(job_id: str, artifact: Artifact) -> str:
    return f"{job_id}/content/{artifact.sha256}"


def _job_of(place: str) -> str:
    return place.split("/", 1)[0]


def _check_path(path: str) -> None:
    if not PLAIN_PATH.fullmatch(path):
        raise ValueError(f"an artifact needs a plain relative path, not {path!r}")
    if Path(path).suffix not in SUFFIXES and path != RECIPE:
        raise ValueError(f"{path!r} is no format that is served; served are {', '.join(sorted(SUFFIXES))}")


def _put(store: Store, job_id: str, path: str, source: Path) -> Artifact:
    with source.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        artifact = Artifact(object="artifact", path=path, size=content.tell(), sha256=sha256)
        content.seek(0)
        store.put(content_name(job_id, artifact), content)
    return artifact


def _save(opened: OpenArtifact, target: Path) -> None:
    durable.make_folder(target.parent)
    with target.open("xb") as bytes_out:
        bytes_out.writelines(opened.parts())
        bytes_out.flush()
        os.fsync(bytes_out.fileno())
    durable.sync_folder(target.parent)


def _corrupt(artifact: Artifact) -> CorruptArtifact:
    message = f"{artifact.path} is not in the artifact store as its manifest says; repeat the recovery"
    return CorruptArtifact("artifact_corrupt", message)
