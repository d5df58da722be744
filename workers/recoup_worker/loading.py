"""Imports of the science, which leave a million objects that stay as long as the process does."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """For imports of torch and what builds on it: the collector looks through nothing of what they make.

    Not now, not whenever a model was let go, and not at the end of the process; a start and an end cost
    two fifths less for it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
