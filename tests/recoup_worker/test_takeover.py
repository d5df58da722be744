"""What an unfinished stage left is its successor's, whole, and out of reach of who left it."""

import contextlib
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from recoup_worker.takeover import take_over


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of two epochs: the first left files, a checkpoint and a draft, the second has begun."""
    left = unfinished(tmp_path, 1)
    (left / "best").mkdir(parents=True)
    (left / "best" / "adapter.json").write_text("{}")
    (left / "step-2").write_text("two")
    (left / ".step-3.0a1b").write_text("torn")
    (tmp_path / "e2" / "distil").mkdir(parents=True)
    return tmp_path


def unfinished(job: Path, epoch: int) -> Path:
    return job / f"e{epoch}" / "distil" / "unfinished"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


LEFT = {"best/adapter.json": "{}", "step-2": "two"}


def test_a_successor_gets_all_but_drafts(job: Path) -> None:
    take_over(job, "distil", 2)
    assert contents(unfinished(job, 2)) == LEFT
    assert not unfinished(job, 1).exists()


def test_nothing_is_taken_where_nothing_was_left(job: Path) -> None:
    take_over(job, "generate", 2)
    take_over(job, "distil", 1)
    assert not (job / "e2" / "generate").exists()
    assert "step-2" in contents(unfinished(job, 1))


def test_an_earlier_holder_that_wakes_up_changes_nothing_of_its_successor(job: Path) -> None:
    asleep = os.open(unfinished(job, 1), os.O_RDONLY)
    take_over(job, "distil", 2)
    os.close(asleep)
    woken = unfinished(job, 1)
    woken.mkdir(parents=True)
    (woken / ".step-9").write_text("nine")
    (woken / ".step-9").rename(woken / "step-9")
    assert contents(unfinished(job, 2)) == LEFT
    (job / "e3" / "distil").mkdir(parents=True)
    take_over(job, "distil", 3)
    assert contents(unfinished(job, 3)) == LEFT


def test_the_latest_epoch_that_left_anything_counts(job: Path) -> None:
    shutil.copytree(unfinished(job, 1), unfinished(job, 9))
    (unfinished(job, 9) / "step-2").write_text("later")
    (job / "e10" / "distil").mkdir(parents=True)
    (job / "e11" / "distil").mkdir(parents=True)
    take_over(job, "distil", 11)
    assert contents(unfinished(job, 11))["step-2"] == "later"


def test_a_takeover_that_was_killed_is_made_anew_from_the_same(job: Path) -> None:
    draft = job / "e2" / "distil" / ".unfinished"
    draft.mkdir()
    (draft / "step-2").write_text("tw")
    (job / "e3" / "distil").mkdir(parents=True)
    take_over(job, "distil", 3)
    assert contents(unfinished(job, 3)) == LEFT


def test_a_file_system_without_second_names_gets_copies(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    take_over(job, "distil", 2)
    assert contents(unfinished(job, 2)) == LEFT


def test_files_that_belong_together_are_taken_together(job: Path) -> None:
    """An earlier holder that is still at work replaces two files in turn, until they are gone."""
    left, places = unfinished(job, 1), ("step-2", "best/adapter.json")

    def work() -> None:
        until = time.monotonic() + 20
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count()):
                for name in places:
                    (left / ".draft").write_text(str(number))
                    (left / ".draft").rename(left / name)
                time.sleep(0.01)

    zombie = threading.Thread(target=work)
    zombie.start()
    time.sleep(0.1)
    take_over(job, "distil", 2)
    zombie.join()
    first, second = (int(contents(unfinished(job, 2))[name]) for name in places)
    assert first - second in {0, 1}
