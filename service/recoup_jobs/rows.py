"""A data set, line by line: bytes in, checked rows out, and a finding for every line that is none.

JSONL: one object a line; blank lines and CRLF do no harm. A file holds prompts
(`messages` or `prompt` rows, mixed as you like) or natural text (`text` rows), not both.
Memory stays bounded whatever arrives.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from recoup.schemas import ChatRow, ProblemItem, PromptRow, TextRow
from recoup_jobs import strict_json
from recoup_jobs.errors import BadRequest, TooLarge, Unprocessable, UnsupportedMedia
from recoup_jobs.findings import MOST_ITEMS, items_of

LONGEST_LINE = 1 << 20
MOST_LINES = 1_000_000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = ChatRow | PromptRow | TextRow
RowKind = Literal["prompts", "text"]
ROWS_BY_FIELD: dict[str, type[Row]] = {"messages": ChatRow, "prompt": PromptRow, "text": TextRow}


def check(numbered: Iterable[tuple[int, bytes]]) -> tuple[RowKind, int]:
    """What the rows are, and how many; raises `Unprocessable` naming up to a hundred findings."""
    kind: RowKind | None = None
    count = 0
    findings: list[ProblemItem] = []
    for number, line in numbered:
        try:
            kind = _same_kind(number, kind, read_row(number, line))
            count += 1
        except Unprocessable as bad_line:
            findings += bad_line.items
        if len(findings) >= MOST_ITEMS:
            break
    if findings:
        raise Unprocessable(
            "invalid_dataset", f"nothing was kept; {findings[0].message}", findings[:MOST_ITEMS]
        )
    if kind is None:
        raise Unprocessable("empty_dataset", "the data set holds no row; each line must be a JSON object")
    return kind, count


def lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of every line that is not blank."""
    for number, line in enumerate(_split(chunks), start=1):
        if len(line) > LONGEST_LINE:
            raise _bad_line(number, "line_too_long", f"longer than {LONGEST_LINE} bytes")
        if number > MOST_LINES:
            raise TooLarge("too_many_rows", f"a data set may have {MOST_LINES} lines at most")
        if stripped := line.strip(b" \t\r"):
            yield number, stripped


def read_row(number: int, line: bytes) -> Row:
    """The row that a line holds; raises `Unprocessable` with findings below `/line/<number>`."""
    if line.startswith(BYTE_ORDER_MARK):
        raise _bad_line(
            number, "byte_order_mark", "begins with a byte order mark; save the file as plain UTF-8"
        )
    try:
        value = strict_json.read(line)
    except (BadRequest, UnsupportedMedia) as error:
        raise _bad_line(number, error.code, error.message) from None
    except Unprocessable as error:
        raise _at_line(number, error.items) from None
    try:
        return _model_for(number, value).model_validate(value)
    except ValidationError as error:
        raise _at_line(number, items_of(error, value)) from None


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines; an endless one comes out cut, just past the length that is refused."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > LONGEST_LINE:
            yield rest
            return
    yield rest


def _model_for(number: int, value: Any) -> type[Row]:
    named = [model for field, model in ROWS_BY_FIELD.items() if isinstance(value, dict) and field in value]
    if not named:
        raise _bad_line(number, "unknown_row", "must be an object with `messages`, `prompt` or `text`")
    return named[0]


def _same_kind(number: int, kind: RowKind | None, row: Row) -> RowKind:
    this: RowKind = "text" if isinstance(row, TextRow) else "prompts"
    if kind not in (None, this):
        raise _bad_line(number, "mixed_rows", f"holds {this}, the lines before it hold {kind}; use two files")
    return this


def _bad_line(number: int, code: str, message: str) -> Unprocessable:
    item = ProblemItem(pointer=f"/line/{number}", code=code, message=f"line {number}: {message}")
    return Unprocessable(code, item.message, [item])


def _at_line(number: int, items: Sequence[ProblemItem]) -> Unprocessable:
    moved = [
        ProblemItem(
            pointer=f"/line/{number}{item.pointer}",
            code=item.code,
            message=f"line {number}: {item.pointer} {item.message}",
        )
        for item in items
    ]
    return Unprocessable("invalid_row", moved[0].message, moved)
