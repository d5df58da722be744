"""Answers are found again by what was asked: whole, once, and whoever was killed meanwhile."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner

MANNER = Manner("0a1b", {"max_tokens": 12, "temperature": 0.0})
APPEND_FOR_EVER = """
import itertools, sys
from pathlib import Path
from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
cache, manner = AnswerCache(Path(sys.argv[1])), Manner("0a1b", {})
for batch in itertools.count():
    cache.append([CachedAnswer(manner.key([batch, place]), (batch, place), "stop") for place in range(64)])
    print(batch, flush=True)
"""

FILL = """
import psutil, sys
from pathlib import Path
from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
manner = Manner("0a1b", {})
with AnswerCache(Path(sys.argv[1])) as cache:
    for start in range(0, 1_000_000, 10_000):
        places = range(start, start + 10_000)
        cache.append(CachedAnswer(manner.key([place]), tuple(range(128)), "stop") for place in places)
    assert all(cache.get(manner.key([place])) for place in range(0, 1_000_000, 97))
    print(len(cache), psutil.Process().memory_info().rss)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    with AnswerCache(tmp_path / "answers") as cache:
        yield cache


def row(*prompt_ids: int, answer: tuple[int, ...] = (5, 2)) -> CachedAnswer:
    return CachedAnswer(MANNER.key(prompt_ids), answer, "stop")


def test_an_answer_is_found_again_by_whoever_opens_the_folder(cache: AnswerCache, tmp_path: Path) -> None:
    cache.append([row(1), row(2, answer=())])
    with AnswerCache(tmp_path / "answers") as other:
        assert other.get(MANNER.key([1])) == row(1)
        assert other.get(MANNER.key([2])) == row(2, answer=())
        assert other.get(MANNER.key([3])) is None


def test_the_first_answer_stays(cache: AnswerCache) -> None:
    cache.append([row(1)])
    cache.append([row(1, answer=(7,)), row(2)])
    assert cache.get(MANNER.key([1])) == row(1)
    assert len(cache) == 2


def test_a_batch_that_fails_leaves_nothing(cache: AnswerCache) -> None:
    def breaking() -> Iterator[CachedAnswer]:
        yield row(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        cache.append(breaking())
    with pytest.raises(OverflowError):
        cache.append([row(2), row(3, answer=(2**40,))])
    assert len(cache) == 0


@pytest.mark.parametrize(
    "other",
    [
        Manner("0a1c", MANNER.sampling),
        Manner("0a1b", {"max_tokens": 13, "temperature": 0.0}),
        Manner("0a1b", {"max_tokens": 12, "temperature": 0.5}),
        Manner("0a1b", MANNER.sampling, template="rewrite"),
    ],
)
def test_another_teacher_and_another_manner_have_answers_of_their_own(other: Manner) -> None:
    assert other.key([1, 2]) != MANNER.key([1, 2])
    assert MANNER.key([1, 2]) != MANNER.key([12])


def test_the_order_in_which_sampling_is_named_means_nothing() -> None:
    assert Manner("0a1b", {"temperature": 0.0, "max_tokens": 12}).key([1]) == MANNER.key([1])


def test_threads_that_append_the_same_leave_each_row_once(cache: AnswerCache) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(cache.append, [[row(at) for at in range(100)]] * 8))
    assert len(cache) == 100


def test_a_killed_process_leaves_whole_batches_and_none_that_it_told_of_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPEND_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines()]
    keys = Manner("0a1b", {})
    with AnswerCache(tmp_path) as cache:
        assert len(cache) % 64 == 0
        assert len(cache) // 64 in {len(told), len(told) + 1}
        for batch in told:
            assert cache.get(keys.key([batch, 63])).answer_ids == (batch, 63)


@pytest.mark.slow
def test_a_million_answers_take_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows, used = map(int, told.split())
    assert rows == 1_000_000
    assert used < 300 * 2**20
