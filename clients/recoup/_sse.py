"""Server-sent events, from bytes as they come: https://html.spec.whatwg.org/multipage/server-sent-events.html

Pure. Lines end in LF or CR LF; comments and unknown fields are passed over, and an event that a broken
stream left half said is dropped.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Frame(NamedTuple):
    """One server-sent event; what it does not say is empty."""

    event: str
    id: str
    data: str


@dataclass
class Decoder:
    """Holds the part of a stream that is not a whole event yet."""

    rest: bytes = b""
    fields: dict[str, list[str]] = field(default_factory=dict)

    def feed(self, chunk: bytes) -> list[Frame]:
        """The events that this chunk completes."""
        *lines, self.rest = (self.rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
        return [frame for line in lines if (frame := self._line(line.decode("utf-8", errors="replace")))]

    def _line(self, line: str) -> Frame | None:
        if line:
            name, _, value = line.partition(":")
            self.fields.setdefault(name, []).append(value.removeprefix(" "))
            return None
        said, self.fields = self.fields, {}
        event, id = (said.get(name, [""])[-1] for name in ("event", "id"))
        return Frame(event, id, "\n".join(said["data"])) if "data" in said else None
