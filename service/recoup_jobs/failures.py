"""What follows from a failure of a job: which code it has, and whether another try may help.

Three counts, each with a bound of its own: failures of the application, losses of the
machinery (a worker or runner that vanished; see `claims.give_back`), and failures of memory, of
which one is forgiven: the next claim carries their number, so that its run can ask for less.
"""

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from recoup.schemas import JobError
from recoup_jobs.scrubber import scrub

OUT_OF_MEMORY, STORAGE_FULL = "out_of_memory", "storage_full"

TOLD_BY = {
    OUT_OF_MEMORY: re.compile(r"CUDA out of memory|OutOfMemoryError|DefaultCPUAllocator|^MemoryError"),
    STORAGE_FULL: re.compile(r"No space left on device|Disk quota exceeded|File too large"),
}
"""How errors that nobody foresaw word what is a code of its own."""


@dataclass(frozen=True)
class Verdict:
    """The job's error, its new counts, and whether it is tried again."""

    error: dict[str, Any]
    counts: dict[str, int]
    again: bool


def judge(job: Row[Any], error: JobError, retry: bool, max_failures: int) -> Verdict:
    """`retry`: whether whoever saw the error thinks that it may pass."""
    code = next((code for code, told in TOLD_BY.items() if told.search(error.message)), error.code)
    failures = job.application_failures + 1
    counts = {"application_failures": failures}
    again = retry and failures < max_failures
    if code == OUT_OF_MEMORY:
        counts |= {"memory_failures": job.memory_failures + 1}
        again = job.memory_failures == 0
    return Verdict(JobError(code=code, message=scrub(error.message)).model_dump(), counts, again)
