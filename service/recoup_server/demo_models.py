"""`python -m recoup_server.demo_models ROOT DAMAGE`: the demo's models, in a process of their own.

Loading torch here, and ending, keeps the launcher small.
"""

import shutil
import sys
from pathlib import Path

from transformers.utils import logging

from recoup_ml import injure, smollm
from recoup_server.demo import HEALTHY, student_name

INJURIES = {
    "finetuning": injure.finetune,
    "quantization": injure.quantize,
    "pruning": injure.prune,
    "none": injure.round_trip,
}


def make(root: Path, damage: str) -> None:
    """Writes the healthy model and the damaged copy below `root`, each if it is not there yet."""
    smollm.convert(root / HEALTHY)
    student = root / student_name(damage)
    if student.exists():
        return
    aside = student.with_name(f".{student.name}")
    shutil.rmtree(aside, ignore_errors=True)
    INJURIES[damage](root / HEALTHY, aside)
    aside.rename(student)


if __name__ == "__main__":
    logging.disable_progress_bar()
    make(Path(sys.argv[1]), sys.argv[2])
