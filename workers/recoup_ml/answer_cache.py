"""Answers that were given before, found again by what was asked: no prompt is answered twice.

An answer depends on who gives it, how, and on the prompt's tokens. A hash of these three is its
key, so recoveries of one teacher share what it said, and one that was killed asks on from the
first answer that is missing. Rows are appended in one transaction, which SQLite has on the disk
when `append` returns: after a crash an answer is there whole or not at all, and never twice.

Beside an answer the teacher's likeliest tokens at its positions may be kept, as `tops.py` packs them.

This is for answers of a server. What a model in this process answers depends, in its last
bits, on what else stood in its batch; `kept_batches.py` keeps those.
"""

import hashlib
import json
import sqlite3
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = "answers.db"
WAIT_SECONDS = 60.0
"""For other processes that are appending."""
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, ids BLOB NOT NULL, finish TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS tops (key BLOB PRIMARY KEY, top BLOB NOT NULL)",
)


@dataclass(frozen=True)
class Manner:
    """Who answers and how: all that an answer depends on beside its prompt's tokens."""

    weights: str
    """What tells the teacher's weights from all others: their sha256, or a name and revision."""
    sampling: Mapping[str, str | int | float | None]
    """Limit, temperature and whatever else is asked of who answers."""
    template: str = ""
    """Of a wrapping that leaves no trace in the prompt's tokens; a chat template does."""

    def key(self, prompt_ids: Sequence[int], *given: Sequence[int]) -> str:
        """The key of the answer to these tokens, 64 hex digits; of what is said of one that is `given`."""
        asked = [self.weights, self.template, dict(self.sampling), list(prompt_ids), *map(list, given)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CachedAnswer:
    """One row."""

    key: str
    answer_ids: tuple[int, ...]
    finish: str
    """`stop` where the end token is the last of `answer_ids`, else `length`."""


class AnswerCache:
    """The rows of one folder. Any number of processes and threads may share it.

    Rows lie in SQLite with its rollback journal, not a write-ahead log: that would need memory that all
    its users share, which a network file system has not. The folder may be removed when nobody works.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._turn = threading.Lock()
        self._rows = sqlite3.connect(folder / FILE, timeout=WAIT_SECONDS, check_same_thread=False)
        self._rows.execute("PRAGMA synchronous = FULL")
        with self._rows:
            for table in SCHEMA:
                self._rows.execute(table)

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._turn:
            return int(self._rows.execute("SELECT count(*) FROM answers").fetchone()[0])

    def get(self, key: str) -> CachedAnswer | None:
        query = "SELECT ids, finish FROM answers WHERE key = ?"
        with self._turn:
            row = self._rows.execute(query, (bytes.fromhex(key),)).fetchone()
        return row and CachedAnswer(key, tuple(array("i", row[0])), row[1])

    def append(self, rows: Iterable[CachedAnswer]) -> None:
        """Adds all rows or none; they survive a power cut from then on. A key that is there keeps its row."""
        values = [(bytes.fromhex(row.key), array("i", row.answer_ids).tobytes(), row.finish) for row in rows]
        with self._turn, self._rows:
            self._rows.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", values)

    def get_top(self, key: str) -> bytes | None:
        with self._turn:
            row = self._rows.execute("SELECT top FROM tops WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        return row and row[0]

    def append_tops(self, tops: Iterable[tuple[str, bytes]]) -> None:
        """Keys and what belongs to them, like `append`."""
        values = [(bytes.fromhex(key), top) for key, top in tops]
        with self._turn, self._rows:
            self._rows.executemany("INSERT OR IGNORE INTO tops VALUES (?, ?)", values)

    def close(self) -> None:
        with self._turn:
            self._rows.close()
