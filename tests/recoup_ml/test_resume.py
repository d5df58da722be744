"""A training that was killed, wherever, ends in the very bits of one that ran through."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recoup.schemas import ChatRow
from recoup_ml import distil, durable
from recoup_ml.recipe import recover
from recoup_ml.run import Interrupted, Run
from recoup_ml.snapshots import Snapshots
from recoup_ml.tickets import ticket_rows
from recoup_ml.weights import Weights

STEPS = 8
SMALL = {
    "generation": {"max_new_tokens": 8},
    "evaluation": {"test_sequences": 16, "validation_sequences": 8, "baselines": False},
    "alignment": {"positions": 256},
}
VALIDATED = defaultdict(lambda: (0, 2, 4, 6, 8), two_stage=(0, 1, 2, 4, 5, 6, 7, 8))
"""After which steps, by method; 0 is the start."""
KEEP = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(24, seed=77)]
METHODS = ["off_policy", "on_policy", "two_stage", "rewrite_sft", "sft", "self_demonstration", "averaged"]
AVERAGED = {
    "student": {"source": "teacher"},
    "teach": {"file": "file-" + "0" * 24, "rehearse": False},
    "method": {
        "type": "self_demonstration",
        "teacher": "ema",
        "ema_rate": 0.3,
        "rollouts": {"refresh_steps": 3},
    },
}
"""A healthy model that is taught by its own moving average."""
LORA = {"mode": "lora", "lora": {"rank": 4, "alpha": 8}}
TRAINABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("forgetful", LORA, {}),
    "dora": ("forgetful", LORA | {"mode": "dora"}, {}),
    "full": ("forgetful", {"mode": "full"}, {}),
    "norms": ("forgetful", {"mode": "norms"}, {}),
    "masked full": ("pruned", {"mode": "full"}, {}),
    "masked lora": ("pruned", LORA, {"output": {"kind": "merged"}}),
    "repaired": ("rounded", LORA | {"start": "repair"}, {}),
    "watched": ("forgetful", LORA, {"alignment": {"positions": 256, "every_steps": 1, "weight": 0.1}}),
    "healthy": ("copy", LORA, {}),
    "healthy full": ("copy", {"mode": "full"}, {}),
    "hopeless": ("forgetful", LORA | {"learning_rate": 1e-9, "stop_early": True}, {}),
}


MORE_TRAINABLE = ["dora", "full", "norms", "masked lora", "repaired"]


@dataclass(frozen=True)
class Prepared:
    """A recovery that stands before its distil stage, and what comes of that stage undisturbed."""

    run: Run
    place: Path
    whole: Path

    def copy(self, place: Path) -> Path:
        return Path(shutil.copytree(self.place, place))


@pytest.fixture(scope="module")
def prepare(
    make_run: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Prepared]:
    """`prepare("sft", "full")`: a recovery by that method that trains that, made once."""
    found: dict[tuple[str, str], Prepared] = {}
    diagnosed: dict[str, Path] = {}

    def make(method: str, trains: str = "lora") -> Prepared:
        if (method, trains) not in found:
            damage, training, others = TRAINABLE[trains]
            averaged = method == "averaged"
            chosen = {"method": {"type": method, "rollouts": {"refresh_steps": 3}}}
            run = make_run(
                damage,
                keep=KEEP if method == "two_stage" else (),
                **SMALL | others | (AVERAGED if averaged else chosen),
                training={"steps": STEPS, "learning_rate": 1e-3, "stop_early": False} | training,
            )
            run = replace(run, teach=KEEP if averaged else ())
            place = tmp_path_factory.mktemp(f"{method}-{trains}".replace(" ", "-"))
            if damage in diagnosed:
                shutil.copytree(diagnosed[damage], place / "diagnose")
            with pytest.raises(ConnectionResetError):
                recover(run, open_journal(place, breaks_in="distil"))
            diagnosed[damage] = place / "diagnose"
            shutil.rmtree(place / ".distil")
            whole = tmp_path_factory.mktemp("whole") / "place"
            found[method, trains] = Prepared(run, place, whole)
            train(run, open_journal(found[method, trains].copy(whole)))
        return found[method, trains]

    return make


def train(run: Run, journal: Any) -> Path:
    """The recovery's distil stage, without what comes after it; its folder."""
    done = {name: journal.place / name for name in ("diagnose", "generate")}
    return journal.stage("distil", lambda folder: distil.distil(run, journal, done, folder))


def outcome(place: Path) -> dict[str, Any]:
    """All that training says of itself, times aside."""
    report = json.loads((place / "distil" / "training.json").read_text())
    for phase in report["phases"]:
        del phase["seconds"]
    return report


def assert_same(found: Path, whole: Path) -> None:
    mine, expected = Weights(found / "distil" / "best"), Weights(whole / "distil" / "best")
    assert set(mine) == set(expected)
    assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []
    assert outcome(found) == outcome(whole)
    last, undisturbed = (
        Snapshots(place / "distil" / durable.UNFINISHED).newest().tensors for place in (found, whole)
    )
    assert last.keys() == undisturbed.keys()
    assert [name for name in last if not torch.equal(last[name], undisturbed[name])] == []


def kill_points(seed: str) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, STEPS + 1), 5))


def steps_told(journal: Any) -> list[int]:
    return [metric["step"] for metric in journal.metrics if metric["name"] == "train"]


def kill_and_go_on(prepared: Prepared, points: Sequence[int], open_journal: type, place: Path) -> None:
    """Kills the training at each of these steps, ever further on, and then lets it end."""
    prepared.copy(place)
    safe = 0
    for point in points:
        killed = open_journal(place, breaks_in="distil", breaks_at=point)
        with pytest.raises(ConnectionResetError):
            train(prepared.run, killed)
        assert steps_told(killed) == list(range(safe + 1, point))
        safe = max(safe, *(step for step in VALIDATED[prepared.run.request.method.type] if step < point))
        torch.manual_seed(point)
    last = open_journal(place)
    train(prepared.run, last)
    assert steps_told(last) == list(range(safe + 1, STEPS + 1))
    assert_same(place, prepared.whole)


@pytest.mark.parametrize("method", METHODS)
def test_five_kills_change_no_bit(
    method: str, prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared = prepare(method, "healthy" if method == "averaged" else "lora")
    kill_and_go_on(prepared, kill_points(method), open_journal, tmp_path / "killed")


@pytest.mark.slow
def test_the_average_of_a_whole_model_goes_on_where_it_was(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    kill_and_go_on(prepare("averaged", "healthy full"), [6], open_journal, tmp_path / "killed")


@pytest.mark.parametrize(
    "trains",
    ["masked full", "watched", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_TRAINABLE)],
)
def test_whatever_trains_goes_on_where_it_was(
    trains: str, prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    points = kill_points(trains)[2:3]
    kill_and_go_on(prepare("off_policy", trains), points, open_journal, tmp_path / "killed")


def test_a_training_that_is_asked_to_stop_goes_on_with_the_next_step(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared, place = prepare("on_policy"), tmp_path / "stopped"
    stopped, again = (open_journal(prepared.copy(place), "distil", 3, stops=True), open_journal(place))
    with pytest.raises(Interrupted):
        train(prepared.run, stopped)
    train(prepared.run, again)
    assert (steps_told(stopped), steps_told(again)) == ([1, 2, 3], [4, 5, 6, 7, 8])
    assert_same(place, prepared.whole)


def test_a_phase_that_was_over_when_the_run_was_stopped_stays_over(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared = prepare("two_stage", "hopeless")
    first = outcome(prepared.whole)["phases"][0]
    assert first["stopped"] == "plateau" and first["steps"] < first["planned_steps"]
    place = prepared.copy(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(prepared.run, open_journal(place, "distil", first["steps"], stops=True))
    train(prepared.run, open_journal(place))
    assert_same(place, prepared.whole)


def test_a_crash_between_snapshot_and_checkpoint_costs_no_checkpoint(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared = prepare("off_policy")
    assert outcome(prepared.whole)["checkpoints"][-1]["chosen"]
    place = prepared.copy(tmp_path / "crashed")
    with pytest.raises(Interrupted):
        train(prepared.run, open_journal(place, "distil", STEPS, stops=True))
    shutil.rmtree(place / ".distil" / durable.UNFINISHED / distil.BEST)
    train(prepared.run, open_journal(place))
    assert_same(place, prepared.whole)


def test_a_crash_before_the_commit_costs_no_step(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared = prepare("sft")
    place = prepared.copy(tmp_path / "crashed")
    done = {name: place / name for name in ("diagnose", "generate")}

    def work(folder: Path) -> None:
        distil.distil(prepared.run, crashed, done, folder)
        raise ConnectionResetError

    crashed, again = open_journal(place), open_journal(place)
    with pytest.raises(ConnectionResetError):
        crashed.stage("distil", work)
    train(prepared.run, again)
    assert steps_told(again) == []
    assert_same(place, prepared.whole)


def test_a_recovery_that_is_asked_to_stop_while_answers_are_made_stops(
    prepare: Callable[..., Prepared], open_journal: type, tmp_path: Path
) -> None:
    prepared = prepare("off_policy")
    shutil.copytree(prepared.place / "diagnose", tmp_path / "diagnose")
    with pytest.raises(Interrupted):
        recover(prepared.run, open_journal(tmp_path, "generate", stops=True))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".generate").rglob("*.safetensors")}
    assert len(kept) == 1
    with pytest.raises(ConnectionResetError):
        recover(prepared.run, open_journal(tmp_path, "distil"))
    for name in ("train", "validation"):
        found, whole = (place / "generate" / name for place in (tmp_path, prepared.place))
        assert found.with_suffix(".jsonl").read_text() == whole.with_suffix(".jsonl").read_text()
        mine, expected = (load_file(path.with_suffix(".safetensors")) for path in (found, whole))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[part], expected[part]) for part in expected)
    assert not (tmp_path / "generate" / durable.UNFINISHED).exists()
