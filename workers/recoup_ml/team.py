"""Processes that train one student together, a device each.

The first leads: it keeps the journal, validates, decides and writes. The others are started by it for the
training alone (`follower.py`), read what it read, and follow. Every process holds the student;
of each step's pieces it learns its share, and gradients are added up over all (data parallelism). A step is
thus the one that a process alone would take, up to the order of float additions, and a training may be taken
up by another number of processes than it was left by.

What the processes tell each other is numbers and JSON, over loopback. One that is gone takes the others
with it: each waits for all in every step.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, distributed, nn

from recoup_ml import models
from recoup_ml.run import Done, Run

T = TypeVar("T")
BRIEF = "team.json"
LONGEST_WAIT = timedelta(hours=1)
"""For a process that validates, or starts from a repair that takes long to make."""
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
BUCKET = 64 << 20
"""Bytes of gradients that are added up at once."""


@dataclass(frozen=True)
class Team:
    """This process's place among those that train."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Which of these are this process's: all, if it is alone."""
        return list(items[self.rank :: self.size])

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every process the sum of all processes' gradients; one without any counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([item.numel() for item in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes."""
        if self.size == 1:
            return [*numbers]
        heard = self.gathered(list(numbers))
        return [sum(column) for column in zip(*heard, strict=True)]

    def told(self, value: Any = None) -> Any:
        """What the leader says, plain JSON; what the others say counts for nothing."""
        return self.gathered(value if self.leads else None)[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, plain JSON, in order."""
        if self.size == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(models.device())
        sizes = torch.zeros(self.size, dtype=torch.long, device=models.device())
        sizes[self.rank] = len(said)
        distributed.all_reduce(sizes)
        padded = [said.new_zeros(int(sizes.max())) for _ in range(self.size)]
        distributed.all_gather(padded, torch.cat([said, said.new_zeros(int(sizes.max()) - len(said))]))
        texts = (row[:size].cpu().numpy().tobytes() for row, size in zip(padded, sizes.tolist(), strict=True))
        return [json.loads(text) for text in texts]


ALONE = Team()


@dataclass(frozen=True)
class Brief:
    """What a process needs to train beside the leader."""

    run: Run
    done: Done
    folder: Path

    def write(self, path: Path) -> None:
        path.write_bytes(TypeAdapter(Brief).dump_json(self))

    @staticmethod
    def read(path: Path) -> "Brief":
        return TypeAdapter(Brief).validate_json(path.read_bytes())


@contextmanager
def gather(brief: Brief) -> Iterator[Team]:
    """The team of `run.processes` that trains what the brief's folder is for, led by this process.

    Raises:
        RuntimeError: another of its processes ended with an error.
    """
    size = brief.run.processes
    if size == 1:
        yield ALONE
        return
    with TemporaryDirectory(prefix="recoup-team-") as place, ExitStack() as ends:
        brief.write(Path(place) / BRIEF)
        others = [ends.enter_context(_another(Path(place), rank, size)) for rank in range(1, size)]
        for other in others:
            if other.stdout is None or not other.stdout.readline():
                raise RuntimeError(
                    "A process that was to train beside this one could not begin; see the log."
                )
        with joined(Path(place), 0, size) as team:
            yield team
        if any(other.wait() for other in others):
            raise RuntimeError("A process that trained beside this one ended with an error; see the log.")


@contextmanager
def joined(place: Path, rank: int, size: int) -> Iterator[Team]:
    """This process's place in the team that meets at `place`."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK)
    store = distributed.FileStore(str(place / "store"), size)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _another(place: Path, rank: int, size: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "recoup_ml.follower", str(place), str(rank), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same tensors, some together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(item.nbytes for item in bucket) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
