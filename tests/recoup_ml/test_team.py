"""Several processes that train together take the steps that one alone would take."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recoup.schemas import ChatRow
from recoup_ml import distil
from recoup_ml.recipe import recover
from recoup_ml.run import Interrupted, Run
from recoup_ml.tickets import ticket_rows
from recoup_ml.weights import Weights

STEPS = 6
GREEDY = {"temperature": 0.0, "refresh_steps": 3}
AVERAGED = {
    "student": {"source": "teacher"},
    "teach": {"file": "file-" + "0" * 24, "rehearse": False},
    "method": {"type": "self_demonstration", "teacher": "ema", "ema_rate": 0.5, "rollouts": GREEDY},
}
"""A healthy model that is taught by its own moving average, of which each process has one."""
TICKETS = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(24, seed=77)]
SMALL = {
    "generation": {"max_new_tokens": 8},
    "evaluation": {"test_sequences": 16, "validation_sequences": 8, "baselines": False},
    "alignment": {"positions": 256},
    "training": {"steps": STEPS, "learning_rate": 1e-3, "stop_early": False, "lora": {"rank": 4, "alpha": 8}},
}


@pytest.fixture(scope="module")
def prepare(
    make_run: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Run, Path]]:
    """`prepare("forgetful", method={…})`: a recovery that stands before its distil stage, and where."""

    def make(damage: str, **request: Any) -> tuple[Run, Path]:
        run, place = make_run(damage, **SMALL | request), tmp_path_factory.mktemp("prepared")
        run = replace(run, teach=TICKETS if run.teaches else ())
        with pytest.raises(ConnectionResetError):
            recover(run, open_journal(place, breaks_in="distil"))
        shutil.rmtree(place / ".distil")
        return run, place

    return make


@pytest.fixture(scope="module")
def adapter_run(prepare: Callable[..., tuple[Run, Path]]) -> tuple[Run, Path]:
    return prepare("forgetful")


def train(run: Run, journal: Any, processes: int) -> dict[str, Any]:
    """The distil stage by so many processes; the training report."""
    done = {name: journal.place / name for name in ("diagnose", "generate")}
    together = replace(run, processes=processes)
    folder = journal.stage("distil", lambda folder: distil.distil(together, journal, done, folder))
    return json.loads((folder / "training.json").read_text())


def curve(report: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in report["curve"]]


def furthest(one: Path, other: Path) -> float:
    """The largest difference of a trained weight, against the largest weight."""
    mine, theirs = Weights(one / "distil" / "best"), Weights(other / "distil" / "best")
    assert set(mine) == set(theirs)
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def copied(place: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(place, tmp_path / name))


@pytest.mark.parametrize(
    ("damage", "request_"),
    [
        ("forgetful", {}),
        ("forgetful", {"method": {"type": "on_policy", "rollouts": GREEDY}}),
        ("copy", AVERAGED),
        pytest.param("pruned", {"alignment": {"positions": 256, "every_steps": 2}}, marks=pytest.mark.slow),
    ],
    ids=["adapter", "rollouts", "averaged", "masked and watched"],
)
def test_two_processes_learn_what_one_does(
    damage: str,
    request_: dict[str, Any],
    prepare: Callable[..., tuple[Run, Path]],
    open_journal: type,
    tmp_path: Path,
) -> None:
    run, place = prepare(damage, **request_)
    alone, together = (copied(place, tmp_path, name) for name in ("alone", "together"))
    expected, found = train(run, open_journal(alone), 1), train(run, open_journal(together), 2)
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4)
    assert [point["step"] for point in found["checkpoints"]] == [
        point["step"] for point in expected["checkpoints"]
    ]
    assert found["tokens"] == expected["tokens"]
    assert furthest(together, alone) < 1e-3


@pytest.mark.slow  # seven processes load torch
def test_a_training_of_two_is_taken_up_by_four(
    adapter_run: tuple[Run, Path], open_journal: type, tmp_path: Path
) -> None:
    run, place = adapter_run
    alone, moved = (copied(place, tmp_path, name) for name in ("alone", "moved"))
    expected = train(run, open_journal(alone), 1)
    stopped, again = open_journal(moved, "distil", 3, stops=True), open_journal(moved)
    with pytest.raises(Interrupted):
        train(run, stopped, 2)
    found = train(run, again, 4)
    assert [metric["step"] for metric in again.metrics if metric["name"] == "train"] == [4, 5, 6]
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4)
    assert furthest(moved, alone) < 1e-3


def test_one_that_fails_ends_the_training_of_all(
    adapter_run: tuple[Run, Path], open_journal: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = adapter_run
    monkeypatch.setenv("PYTHONPATH", str(broken_follower(tmp_path)), prepend=None)
    with pytest.raises(RuntimeError, match="could not begin"):
        train(run, open_journal(copied(place, tmp_path, "broken")), 2)


def broken_follower(tmp_path: Path) -> Path:
    """A folder that, on the path, keeps torch from being imported."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('no torch on this machine')\n")
    return folder


def test_a_loss_that_is_not_finite_is_so_for_all() -> None:
    from recoup_ml.team import ALONE

    assert math.isnan(sum(ALONE.totals([math.nan, 1.0])))
    assert ALONE.told({"kl": math.inf}) == {"kl": math.inf}
    assert torch.isfinite(torch.tensor(ALONE.totals([1.0, 2.0]))).all()
