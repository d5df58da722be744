"""Which GPUs of this host a worker has for itself: those that `RECOUP_GPUS` names.

Its runners see these and no others (`CUDA_VISIBLE_DEVICES`). A lock for each GPU, below home, is held for as
long as the worker lives, so that two workers of one home on one host share no GPU; the kernel lets go of it
however the worker ends. A GPU that is named once by number and once by UUID is not recognised. A recovery
trains on all of the set (`recoup_ml/team.py`) and does the rest on the first.
"""

import fcntl
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def owned(gpus: Sequence[str], home: Path) -> Iterator[None]:
    """Holds these GPUs; ends the process, with a sentence, where another worker has one of them."""
    folder = home / "gpus"
    with ExitStack() as held:
        for gpu in gpus:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()}.{gpu.replace('/', '.')}.lock"
            lock = held.enter_context((folder / name).open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"GPU {gpu} belongs to another worker of {home} on this host; change RECOUP_GPUS."
                raise SystemExit(message) from None
        yield


def visible(gpus: Sequence[str]) -> dict[str, str]:
    """What makes a process see these GPUs alone; where none are named, it sees what its parent sees."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
