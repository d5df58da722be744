"""Crashes a process of the installation once, at the commit or rename that `RECOUP_CRASH_AT` names.

`RECOUP_CRASH_AT=runner:before:7:/path/of/a/mark`: the runner dies by SIGKILL just before its
seventh commit (`after`: just after; `rename`: before its seventh rename), unless the mark is
there already. Python imports this file by itself at its start, where it lies on the path.
"""

import os
import signal
import sys
from itertools import count

ROLES = {"worker": "worker", "recoup_worker.runner": "runner"}


def main() -> None:
    role, when, number, mark = os.environ["RECOUP_CRASH_AT"].split(":")
    if role not in {ROLES.get(word) for word in sys.orig_argv}:
        return
    counter = count(1)

    def crash() -> None:
        if next(counter) == int(number):
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    if when == "rename":
        sys.addaudithook(lambda event, _: crash() if event == "os.rename" else None)
    else:
        at_commits(crash, when)


def at_commits(crash, when: str) -> None:
    from sqlalchemy.engine.default import DefaultDialect

    commit = DefaultDialect.do_commit

    def do_commit(self, connection):
        if when == "before":
            crash()
        commit(self, connection)
        if when == "after":
            crash()

    DefaultDialect.do_commit = do_commit


if "RECOUP_CRASH_AT" in os.environ:
    main()
