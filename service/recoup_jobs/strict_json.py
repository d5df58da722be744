"""JSON (RFC 8259) as this service accepts it: what two readers could understand differently is refused.

Python's reader takes the last of two equal keys, half a surrogate pair and nesting without end; databases
refuse what it lets through, and other programs read it otherwise. Numbers beyond all bounds become infinite
here: whatever they were meant for, its bounds name the place.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from recoup.schemas import ProblemItem
from recoup_jobs.errors import BadRequest, Unprocessable, UnsupportedMedia
from recoup_jobs.findings import pointer

DEEPEST = 64
LONGEST_INTEGER = 100

# Possessive: a string that never ends is looked at once, not once for each quote in it.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
MAY_BE_UNSTORABLE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def read(raw: bytes) -> Any:
    """The value; raises `BadRequest` for what is no JSON, `Unprocessable` for text that nothing can store."""
    if json.detect_encoding(raw) != "utf-8":
        raise UnsupportedMedia("unsupported_media_type", "send JSON as UTF-8 without a byte order mark")
    _refuse_depth(raw)
    try:
        value = _decoder.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise BadRequest("malformed_json", f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadRequest("malformed_json", f"not JSON at character {error.pos}: {error.msg}") from None
    if MAY_BE_UNSTORABLE.search(raw):
        _refuse_unstorable(value)
    return value


def _refuse_depth(raw: bytes) -> None:
    if raw.count(b"[") + raw.count(b"{") <= DEEPEST:
        return
    depth = 0
    for bracket in STRING.sub(b"", raw).translate(None, NOT_A_BRACKET):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST:
            raise BadRequest("too_deep", f"objects and arrays may be nested {DEEPEST} deep at most")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadRequest("duplicate_key", "an object has the same key twice; which one is meant is not said")
    return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else math.inf


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _refuse_unstorable(value: Any) -> None:
    for place in _unstorable(value, ()):
        message = "text must not hold NUL or half a surrogate pair"
        item = ProblemItem(pointer=pointer(place), code="invalid_value", message=message)
        raise Unprocessable(item.code, f"{item.pointer}: {message}", [item])


def _unstorable(value: Any, place: tuple[int | str, ...]) -> Iterator[tuple[int | str, ...]]:
    """The places of strings, and of objects with keys, that hold such characters."""
    if isinstance(value, str) and UNSTORABLE.search(value):
        yield place
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unstorable(inner, (*place, index))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if UNSTORABLE.search(key):
                yield place
            yield from _unstorable(inner, (*place, key))
