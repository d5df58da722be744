"""Takes secrets out of texts before they are written: into a log, an event, a problem or a row.

It knows secrets by their shape (keys of Recoup, Hugging Face, OpenAI and GitHub, secrets of webhooks, what
stands behind `Bearer`, passwords in URLs). It is a net beneath those who keep secrets out of texts, not their
replacement: a secret of another shape goes through.
"""

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

GONE = "[secret]"
SHAPES = re.compile(
    r"""
      (?P<before> \b[a-z][a-z0-9+.-]{1,15}://[^\s/:@]{0,256}: ) [^\s/@]{1,512} (?=@)
    | (?P<scheme> \bbearer\s+ ) [a-z0-9._~+/-]{8,}=*
    | \b(?: recoup_[0-9a-f]{12}_[a-z0-9_-]{20,} | hf_[a-z0-9]{16,} | sk-[a-z0-9_-]{16,}
        | gh[pousr]_[a-z0-9]{20,} | whsec_[a-z0-9+/]{16,}=* )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def scrub(text: str) -> str:
    return SHAPES.sub(lambda found: (found["before"] or found["scheme"] or "") + GONE, text)


def scrubbed(value: Any) -> Any:
    """JSON with all of its texts scrubbed, names aside."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {name: scrubbed(inner) for name, inner in value.items()}
    return [scrubbed(inner) for inner in value] if isinstance(value, list) else value


def places_of_secrets(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where JSON holds a text that looks like one."""
    if isinstance(value, str) and SHAPES.search(value):
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from places_of_secrets(part, (*at, name))


def scrub_logs() -> None:
    """From now on whatever this process logs, by whichever library and handler, is scrubbed."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Scrubbing):
        logging.setLogRecordFactory(_Scrubbing(make))


def scrub_prints() -> None:
    """From now on whatever this process prints, by whichever library, is scrubbed, each writing by itself."""
    sys.stdout, sys.stderr = _Scrubbed(sys.stdout), _Scrubbed(sys.stderr)


class _Scrubbed:
    """A text stream, of which others see nothing but its texts changed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Scrubbing:
    """Makes records whose message, arguments and traceback are scrubbed."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        record.msg = _told(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(map(_told, record.args))
        elif record.args:
            record.args = {name: _told(value) for name, value in record.args.items()}
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = scrub(logging.Formatter().formatException(record.exc_info))
        return record


def _told(value: Any) -> Any:
    """The value itself, for formats such as `%d`, unless its text holds a secret."""
    text = str(value)
    clean = scrub(text)
    return value if clean == text else clean
