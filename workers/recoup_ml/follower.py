"""A process that trains beside the one that leads: `python -m recoup_ml.follower <place> <rank> <size>`."""

import contextlib
import gc
import os
import sys
from pathlib import Path

import torch

from recoup_ml import distil
from recoup_ml.run import Interrupted
from recoup_ml.team import BRIEF, Brief, joined


class Quiet:
    """Nobody is told anything, and nobody asks for a stop: both are the leader's."""

    def stopping(self) -> bool:
        return False

    def progress(self, done: int, total: int, unit: str) -> None:
        pass

    def metric(self, **values: str | float | int | bool | None) -> None:
        pass


def main() -> None:
    gc.freeze()  # what the imports left stays: the collector need not look at it again
    place, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    brief = Brief.read(place / BRIEF)
    print("ready", flush=True)
    os.dup2(2, 1)  # nobody reads on: what else is printed belongs into the log
    with joined(place, rank, size) as team, contextlib.suppress(Interrupted):
        distil.train(brief, Quiet(), team)


if __name__ == "__main__":
    main()
