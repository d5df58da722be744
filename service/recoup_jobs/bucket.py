"""A bucket of Amazon's S3, or of whatever speaks its protocol, as a store, by obstore (Rust's object_store).

Credentials and region come from where all S3 clients look for them: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, or the machine's role. An object appears whole or not at all. A large
one is sent in parts, each with its sha256 for the server to check; parts of an upload that was killed stay in
the bucket unseen, and a lifecycle rule (`AbortIncompleteMultipartUpload`) is what removes them. Reading asks
for one range after the other, so that no request takes longer than its own few megabytes.
"""

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from recoup_jobs.errors import Unavailable

PART = 8 << 20
MOST_PARTS = 9000
"""S3 takes 10000 parts an object."""
PARTS_AT_ONCE = 4
REQUEST_SECONDS, TRIES = "60s", 4
PATIENCE = datetime.timedelta(seconds=20)
"""No request is sent again after so long."""

log = logging.getLogger(__name__)


class BucketStore:
    """Objects below a prefix; `url` is `s3://bucket/prefix`."""

    def __init__(self, url: str, endpoint: str | None) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=endpoint,
            checksum_algorithm="SHA256",
            client_options={
                "timeout": REQUEST_SECONDS,
                "allow_http": endpoint is not None and endpoint.startswith("http://"),
            },
            retry_config={"max_retries": TRIES, "retry_timeout": PATIENCE},
        )

    def put(self, name: str, content: BinaryIO) -> None:
        part = max(PART, -(-content.seek(0, os.SEEK_END) // MOST_PARTS))
        content.seek(0)
        with _reached(name):
            obstore.put(self._store, name, content, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        with _reached(name):
            stop = min(stop, obstore.head(self._store, name)["size"])
        for at in range(start, stop, PART):
            with _reached(name):
                part = bytes(obstore.get_range(self._store, name, start=at, end=min(at + PART, stop)))
            yield part

    def names(self, folder: str) -> list[str]:
        with _reached(folder):
            return sorted(meta["path"] for page in obstore.list(self._store, folder) for meta in page)

    def remove(self, names: list[str]) -> None:
        if names:
            with _reached(names[0]):
                obstore.delete(self._store, names)


@contextmanager
def _reached(name: str) -> Iterator[None]:
    try:
        yield
    except BaseError as error:
        log.warning("no answer for %s: %s", name, str(error).splitlines()[0])
        raise Unavailable("artifacts_unavailable", "the artifact store does not answer; try again") from error
