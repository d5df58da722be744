from types import SimpleNamespace

import pytest

from recoup.schemas import JobError
from recoup_jobs.failures import judge


def fresh(**counts):
    return SimpleNamespace(**{"application_failures": 0, "memory_failures": 0} | counts)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out_of_memory"),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate",
            "out_of_memory",
        ),
        ("MemoryError: ", "out_of_memory"),
        ("OSError: [Errno 28] No space left on device", "storage_full"),
        ("KeyError: 'memory'", "internal_error"),
    ],
)
def test_an_error_is_recognised_by_its_words(message, code):
    assert judge(fresh(), JobError(code="internal_error", message=message), True, 3).error["code"] == code


def test_memory_may_run_out_once():
    error = JobError(code="out_of_memory", message="CUDA out of memory")
    first = judge(fresh(), error, False, 3)
    assert (first.again, first.counts["memory_failures"]) == (True, 1)
    assert not judge(fresh(memory_failures=1, application_failures=1), error, True, 3).again


@pytest.mark.parametrize(
    ("failures", "retry", "again"), [(0, True, True), (2, True, False), (0, False, False)]
)
def test_other_failures_are_tried_again_as_often_as_is_allowed(failures, retry, again):
    error = JobError(code="teacher_unavailable", message="no answer")
    assert judge(fresh(application_failures=failures), error, retry, 3).again is again
