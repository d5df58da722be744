"""What a recovery hands over: a folder of files and the manifest that names them.

The folder is built aside and renamed into place as a whole, its manifest written last: a
reader sees all files or none. Nothing is served that the manifest does not name, and
nothing is published whose format can carry code, but for the script that Recoup itself writes.
"""

import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter

from recoup.schemas import Artifact
from recoup_jobs import durable
from recoup_jobs.errors import NotFound

ARTIFACTS = "artifacts"
"""The folder of published files inside that of the package stage."""
MANIFEST = "manifest.json"
SUFFIXES = frozenset(
    {".safetensors", ".json", ".jsonl", ".txt", ".md", ".html", ".svg", ".png", ".csv", ".jinja", ".model"}
)
RECIPE = "recipe.py"
"""The script that repeats a training."""
PLAIN_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*")

Manifest = TypeAdapter(list[Artifact])


def publish(folder: Path, files: Mapping[str, Path]) -> list[Artifact]:
    """Copies `files` (path within the folder -> source) into `folder`, replacing what was published before.

    Raises `ValueError` for a path that leaves the folder and for a format that is not served.
    """
    for path in files:
        _check_path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    try:
        published = [_copy(aside, path, source) for path, source in sorted(files.items())]
        durable.write(aside / MANIFEST, Manifest.dump_json(published, indent=1))
        durable.sync_folder(aside)
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return published


def read_manifest(folder: Path) -> list[Artifact]:
    """The published files; raises `NotFound` where nothing is published."""
    try:
        return Manifest.validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise NotFound("no_artifacts", "this recovery published no artifacts") from None


def open_artifact(folder: Path, path: str) -> Path:
    """Where the published file lies; raises `NotFound` for all that the manifest does not name."""
    if path not in {artifact.path for artifact in read_manifest(folder)}:
        raise NotFound("artifact_not_found", "the manifest of this recovery names no such artifact")
    return folder / path


def _check_path(path: str) -> None:
    if not PLAIN_PATH.fullmatch(path) or path == MANIFEST:
        raise ValueError(f"an artifact needs a plain relative path, not {path!r}")
    if Path(path).suffix not in SUFFIXES and path != RECIPE:
        raise ValueError(f"{path!r} is no format that is served; served are {', '.join(sorted(SUFFIXES))}")


def _copy(aside: Path, path: str, source: Path) -> Artifact:
    target = aside / path
    target.parent.mkdir(parents=True, exist_ok=True)
    size, sha256 = durable.copy(source, target)
    durable.sync_folder(target.parent)
    return Artifact(object="artifact", path=path, size=size, sha256=sha256)


def _swap(aside: Path, folder: Path) -> None:
    old = aside.with_name(f"{aside.name}.old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    durable.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
