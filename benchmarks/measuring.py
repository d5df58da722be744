"""What benchmarks share: memory of this process, or of the GPU that it uses, while something runs."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def memory(*, gpu: bool = False) -> Iterator[list[float]]:
    """MiB of this process: first before the block, then every hundredth of a second inside it.

    On a GPU, of what torch holds there: before the block, and at most.
    """
    gc.collect()
    if gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
        on_device = [torch.cuda.memory_allocated() / 2**20]
        yield on_device
        on_device.append(torch.cuda.max_memory_allocated() / 2**20)
        return
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


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def settle() -> None:
    """Waits for what the GPU was asked to do."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()
