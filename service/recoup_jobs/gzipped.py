"""Data sets may arrive gzipped; one that unpacks to far more than was sent is a bomb, and stops at once.

Unpacked once: gzip inside gzip comes out as gzip, which is no JSONL.
"""

import zlib
from collections.abc import Iterable, Iterator

from recoup_jobs.durable import CHUNK
from recoup_jobs.errors import BadRequest, TooLarge

MAGIC = b"\x1f\x8b"
MOST_TIMES = 20
ALWAYS_ALLOWED = CHUNK
"""Bytes that even the smallest upload may unpack to."""
GZIP_WINDOW = 31


def unpacked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks as they are, or unpacked where the first begins as gzip does.

    Raises `TooLarge` past twenty times what was sent, `BadRequest` for a stream that is damaged.
    """
    inside = None
    sent = made = 0
    for index, chunk in enumerate(chunks):
        if index == 0 and chunk.startswith(MAGIC):
            inside = zlib.decompressobj(GZIP_WINDOW)
        if inside is None:
            yield chunk
            continue
        sent += len(chunk)
        for piece in _inflated(inside, chunk):
            made += len(piece)
            if made > max(ALWAYS_ALLOWED, MOST_TIMES * sent):
                raise TooLarge("decompressed_too_large", f"unpacks to more than {MOST_TIMES} times its size")
            yield piece
    if inside is not None and not inside.eof:
        raise BadRequest("malformed_gzip", "the gzip stream ends too early")


def _inflated(inside: "zlib._Decompress", chunk: bytes) -> Iterator[bytes]:
    try:
        while chunk:
            yield inside.decompress(chunk, CHUNK)
            chunk = inside.unconsumed_tail
    except zlib.error:
        raise BadRequest("malformed_gzip", "the upload begins as gzip does, and is none") from None
    if inside.unused_data:
        raise BadRequest("malformed_gzip", "something follows the end of the gzip stream")
