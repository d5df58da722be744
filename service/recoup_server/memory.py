"""How much memory this process and all its descendants take together, at their highest."""

import threading
from types import TracebackType

import psutil

SAMPLE_SECONDS = 0.5


class PeakMemory:
    """Samples resident memory inside a `with` block; pages shared by two processes count twice."""

    def __init__(self) -> None:
        self.peak = 0
        """Bytes."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        root = psutil.Process()
        while not self._stopping.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_resident, [root, *root.children(recursive=True)])))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
