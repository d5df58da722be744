"""Where published bytes lie: names, each with bytes that are there whole or not at all.

Two stores are one to their users: a folder, and a bucket that speaks the protocol of Amazon's S3.
Neither knows what its names mean; `artifacts.py` does. A name's bytes may be put again and then
replace the former; what is put is durable once `put` has come back.
"""

import secrets
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from recoup_jobs import durable
from recoup_jobs.settings import Settings


class Store(Protocol):
    """Names are plain relative paths. Where nothing lies under a name, `FileNotFoundError` is raised.

    A store that cannot be reached raises `errors.Unavailable`.
    """

    def put(self, name: str, content: BinaryIO) -> None:
        """Copies all bytes of a file, open at its beginning, under the name."""
        ...

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, in parts; fewer if fewer are there."""
        ...

    def names(self, folder: str) -> list[str]:
        """All names below a folder, drafts of puts that broke off among them."""
        ...

    def remove(self, names: list[str]) -> None:
        """A name that is not there does no harm."""
        ...


def open_store(settings: Settings) -> Store:
    """The store that the settings name; the default is a folder below home."""
    if settings.artifacts_url is None:
        return FolderStore(settings.home / "artifacts")
    return _bucket(settings.artifacts_url, settings.artifacts_endpoint)


@lru_cache(maxsize=4)
def _bucket(url: str, endpoint: str | None) -> Store:
    """One client a process: it keeps connections."""
    from recoup_jobs.bucket import BucketStore

    return BucketStore(url, endpoint)


class FolderStore:
    """Files below a folder, written aside, flushed and renamed into place."""

    PART = 1 << 20

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, content: BinaryIO) -> None:
        target = self._root / name
        durable.make_folder(target.parent)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            durable.copy(content, aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        durable.sync_folder(target.parent)

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        with (self._root / name).open("rb") as content:
            content.seek(start)
            while part := content.read(min(self.PART, stop - content.tell())):
                yield part

    def names(self, folder: str) -> list[str]:
        files = (path for path in (self._root / folder).rglob("*") if path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path in files)

    def remove(self, names: list[str]) -> None:
        for name in names:
            path = self._root / name
            path.unlink(missing_ok=True)
            for folder in path.parents[: len(Path(name).parts) - 1]:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
