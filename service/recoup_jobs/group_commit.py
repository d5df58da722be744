"""One commit for the writes of several threads: to reach the disk costs more than all else of a small write.

Who comes while another's commit is on its way to the disk waits anyhow; the first of those who waited then
writes for all of them. Each write has a savepoint, so that one which is refused takes no other along.
PostgreSQL does as much by itself, across processes.
"""

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine

T = TypeVar("T")
Write = Callable[[Connection], T]


class GroupCommit:
    """Writes of the threads of a process to a SQLite database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._waiting: deque[_Waiting[Any]] = deque()

    def run(self, write: Write[T]) -> T:
        """What `write` returns, once it is on the disk; raises what it raises, or what the commit does."""
        mine = _Waiting(write)
        self._waiting.append(mine)
        with self._turn:
            if not mine.done:
                self._commit([self._waiting.popleft() for _ in range(len(self._waiting))])
        return mine.answer()

    def _commit(self, together: "Sequence[_Waiting[Any]]") -> None:
        try:
            with self._engine.begin() as conn:
                for one in together:
                    one.write_to(conn)
        except BaseException as error:
            for one in together:
                one.error = one.error or error
        for one in together:
            one.done = True


class _Waiting(Generic[T]):
    """A thread's write, and what came of it."""

    value: T

    def __init__(self, write: Write[T]) -> None:
        self._write = write
        self.error: BaseException | None = None
        self.done = False

    def write_to(self, conn: Connection) -> None:
        # Beneath SQLAlchemy, as in `database.py`: three small statements.
        driver = conn.connection.dbapi_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.execute("SAVEPOINT one")
        try:
            self.value = self._write(conn)
        except Exception as error:
            driver.execute("ROLLBACK TO one")
            self.error = error
        driver.execute("RELEASE one")

    def answer(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value
