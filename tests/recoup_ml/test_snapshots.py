"""What a training goes on from: read back as it was, the newest, and none that cannot be read."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from recoup_ml.snapshots import (
    EVERY_SECONDS,
    Snapshot,
    Snapshots,
    dice,
    moments,
    restore_dice,
    restore_moments,
)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def snapshot(value: float) -> Snapshot:
    return Snapshot.of({"weights": {"a.b": torch.full((2, 3), value)}}, {"curve": [value]})


def rolls() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), *torch.rand(3).tolist()


def test_the_newest_snapshot_is_read_back_as_it_was(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path)
    assert kept.newest() is None
    for step in (9, 10):
        kept.write(step, snapshot(step + 0.1))
    found = Snapshots(tmp_path).newest()
    assert found.state == {"curve": [10.1]}
    assert torch.equal(found.group("weights")["a.b"], torch.full((2, 3), 10.1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010.safetensors"]


@pytest.mark.parametrize("content", [b"", b"torn", (2**40).to_bytes(8, "little") + b"{}"])
def test_what_cannot_be_read_is_passed_over(content: bytes, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path)
    kept.write(3, snapshot(3.0))
    (tmp_path / "step-000000004.safetensors").write_bytes(content)
    assert kept.newest().state == {"curve": [3.0]}


def test_a_draft_is_no_snapshot(tmp_path: Path) -> None:
    Snapshots(tmp_path).write(3, snapshot(3.0))
    (tmp_path / "step-000000003.safetensors").rename(tmp_path / ".step-000000003.safetensors.0a1b")
    assert Snapshots(tmp_path).newest() is None


def test_snapshots_are_due_when_the_last_is_a_while_ago_and_when_the_run_shall_stop(tmp_path: Path) -> None:
    clock, stop = Clock(), []
    kept = Snapshots(tmp_path, lambda: bool(stop), clock)
    assert not kept.due()
    clock.now = EVERY_SECONDS
    assert kept.due()
    kept.write(1, snapshot(1.0))
    clock.now = 2 * EVERY_SECONDS - 1
    assert not kept.due()
    stop.append(True)
    assert kept.due()


def test_dice_that_were_put_back_fall_alike() -> None:
    torch.rand(5), np.random.normal(), random.gauss(0, 1)  # leaves a second normal number in store
    tensors, state = dice()
    first = rolls(), random.gauss(0, 1), np.random.normal()
    restore_dice(tensors, state)
    assert (rolls(), random.gauss(0, 1), np.random.normal()) == first


def test_an_optimizer_that_was_put_back_takes_the_same_step() -> None:
    def stepped(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        named = {"a/b": torch.nn.Parameter(torch.ones(4)), "c": torch.nn.Parameter(torch.ones(2))}
        optimizer = torch.optim.AdamW(named.values(), lr=0.1, fused=True)
        for step in range(steps):
            step_on(named, optimizer, step)
        return named, optimizer

    def step_on(named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
        for parameter in named.values():
            parameter.grad = torch.arange(len(parameter), dtype=torch.float32) - step
        optimizer.step()

    whole, _ = stepped(4)
    named, optimizer = stepped(3)
    fresh, other = stepped(0)
    restore_moments(other, fresh, moments(optimizer, named))
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(named[name])
    step_on(fresh, other, 3)
    assert all(torch.equal(fresh[name], whole[name]) for name in whole)
