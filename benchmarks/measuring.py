"""What benchmarks share: memory of this process while something runs."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def memory() -> Iterator[list[float]]:
    """MiB of this process: first before the block, then every hundredth of a second inside it."""
    gc.collect()
    process, stop = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss / 2**20]

    def watch() -> None:
        while not stop.wait(0.01):
            seen.append(process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()
