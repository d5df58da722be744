"""All that a training needs to go on as if nothing had happened, at a step's end, on the disk.

A snapshot is one safetensors file: weights that train, their moving average where that teaches, the
optimizer's moments and the states of the random generators as tensors and, as JSON in a tensor of
bytes (a header is bounded, rollouts are not), where training stands and where each course is. Nothing
is pickled. The learning rate needs no state, being a function of the step. On a CPU a run that was
killed and goes on from a snapshot ends in the same bits as one that ran through.

The newest snapshot replaces the one before. That happens after every validation, when the last is
a while ago, and when the run is asked to stop.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup_ml import durable

FORMAT = "1"
"""A snapshot of another format is of another release, and is passed over."""
STATE = "state"
EVERY_SECONDS = 300.0
"""How much of a training a crash may cost."""
LEAST_RATIO = 20
"""Training between two snapshots takes at least so many times as long as writing one."""


@dataclass(frozen=True)
class Snapshot:
    tensors: Mapping[str, Tensor]
    """By `<group>:<name>`."""
    state: dict[str, Any]
    """Plain JSON."""

    @staticmethod
    def of(groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> "Snapshot":
        named = {f"{group}:{name}": item for group, items in groups.items() for name, item in items.items()}
        return Snapshot(named, state)

    def group(self, name: str) -> dict[str, Tensor]:
        return {
            key.partition(":")[2]: item for key, item in self.tensors.items() if key.startswith(f"{name}:")
        }


class Snapshots:
    """The newest snapshot of one training, in a folder; `stopping` says whether the run is to end.

    Args:
        clock: seconds that only grow.
    """

    def __init__(
        self,
        folder: Path,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self.stopping, self._clock = folder, stopping, clock
        self._due = clock() + EVERY_SECONDS

    def newest(self) -> Snapshot | None:
        """The snapshot to go on from; none where there is none that can be read."""
        found = (_read(path) for path in sorted(self._folder.glob("step-*.safetensors"), reverse=True))
        return next((snapshot for snapshot in found if snapshot), None)

    def due(self) -> bool:
        return self.stopping() or self._clock() >= self._due

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Keeps this snapshot, taken after `step` steps, in place of all others."""
        began = self._clock()
        target = self._folder / f"step-{step:09d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
        tensors[STATE] = torch.frombuffer(bytearray(json.dumps(snapshot.state).encode()), dtype=torch.uint8)
        durable.place(target, lambda aside: save_file(tensors, aside, {"format": FORMAT}))
        for other in self._folder.glob("step-*.safetensors"):
            if other != target:
                other.unlink()
        took = self._clock() - began
        self._due = self._clock() + max(EVERY_SECONDS, LEAST_RATIO * took)


def moments(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state, `<parameter's name>/<what>`."""
    return {
        f"{name}/{what}": value
        for name, parameter in names.items()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Puts back what `moments` gave; `names` in the order in which the optimizer has its parameters."""
    places = {name: place for place, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, what = key.rsplit("/", 1)
        state.setdefault(places[name], {})[what] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def dice() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of every global random generator: torch's on each device; numpy's and Python's as JSON."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {"cpu": torch.get_rng_state()} | {f"cuda{at}": state for at, state in enumerate(devices)}
    name, keys, *rest = np.random.get_state()
    return tensors, {"numpy": [name, keys.tolist(), *rest], "python": random.getstate()}


def restore_dice(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Puts back what `dice` gave, for the devices that there are."""
    torch.set_rng_state(tensors["cpu"])
    for at in range(torch.cuda.device_count()):
        if f"cuda{at}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{at}"], at)
    np.random.set_state(tuple(state["numpy"]))
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))


def _read(path: Path) -> Snapshot | None:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        if header.get("format") != FORMAT:
            return None
        tensors = load_file(path)
        return Snapshot(tensors, json.loads(tensors.pop(STATE).numpy().tobytes()))
    except SafetensorError:
        return None
