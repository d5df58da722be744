"""What the folder of one model says about it, and what is wrong with it, without torch.

A folder is read anew only once it has changed: the names, sizes, inodes and times of its files are the
key under which its inspection is kept. Files are replaced by renaming or rewriting them, either of which
shows there; who forges the times of his own model's files deceives nobody but himself, since the runner
inspects the folder again in a process of its own. For the same reason a sweep over one pair of models, which
asks for many recoveries at once, has its folders looked at once a second and not once a request.
"""

import hashlib
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recoup_jobs import chat_templates
from recoup_jobs.errors import RecoupError
from recoup_jobs.sources import (
    ModelFolder,
    check_weights,
    locate,
    read_chat_template,
    read_config,
    read_quantizer,
    read_vocabulary,
    refuse_remote_code,
)
from recoup_jobs.weights import TensorInfo

MOST_KEPT = 32
"""Inspections."""
SOUND_SECONDS = 1.0
"""For so long a folder in which nothing was wrong is taken to be as it was."""

Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Vocabulary:
    size: int
    sha256: str
    """Of all tokens with their ids, in whatever order the tokenizer has them."""


@dataclass(frozen=True)
class Model:
    path: Path
    config: dict[str, Any]
    quantizer: str | None
    """Which method packed its weights, if one did."""
    vocabulary: Vocabulary | None
    chat_template: Any
    tensors: Mapping[str, TensorInfo] | None
    """None where the weights are not sound."""

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(info.shape) for info in (self.tensors or {}).values())

    @cached_property
    def stored_bytes(self) -> int:
        return sum(info.bytes for info in (self.tensors or {}).values())


@dataclass(frozen=True)
class Inspection:
    model: Model | None
    """None where the folder cannot be read as a model."""
    faults: tuple[tuple[str, str], ...]
    """(code, message) of everything that is wrong."""


class Inspections:
    """The latest inspections of this process; safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[Path, tuple[Stamp, Inspection]] = OrderedDict()
        self._sound: dict[tuple[str | Path, ...], tuple[Inspection, float]] = {}
        self._lock = threading.Lock()

    def named(self, source: str, roots: Sequence[Path]) -> Inspection:
        """Of the folder that `source` names below one of the roots; raises `Unprocessable` for none."""
        name: tuple[str | Path, ...] = (source, *roots)
        moment = self._clock()
        found, until = self._sound.get(name, (None, 0.0))
        if found is not None and moment < until:
            return found
        found = self.of(locate(source, roots))
        with self._lock:
            self._sound = {known: sound for known, sound in self._sound.items() if sound[1] > moment}
            if not found.faults:
                self._sound[name] = found, moment + SOUND_SECONDS
        return found

    def of(self, folder: ModelFolder) -> Inspection:
        stamp = _stamp(folder)
        with self._lock:
            kept = self._kept.get(folder.path)
            if kept is not None and kept[0] == stamp:
                self._kept.move_to_end(folder.path)
                return kept[1]
        found = inspect(folder)
        with self._lock:
            self._kept[folder.path] = stamp, found
            self._kept.move_to_end(folder.path)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return found


def inspect(folder: ModelFolder) -> Inspection:
    faults: list[tuple[str, str]] = []
    tensors = None
    try:
        refuse_remote_code(folder)
    except RecoupError as error:
        faults.append((error.code, error.message))
    try:
        tensors = check_weights(folder)
    except RecoupError as error:
        faults.append((error.code, error.message))
    try:
        config, vocabulary = read_config(folder), _vocabulary(read_vocabulary(folder))
        quantizer, template = read_quantizer(config), read_chat_template(folder)
        if not faults:  # a folder that is refused anyway is not rendered
            chat_templates.check(template)
    except RecoupError as error:
        return Inspection(None, (*faults, (error.code, error.message)))
    return Inspection(Model(folder.path, config, quantizer, vocabulary, template, tensors), tuple(faults))


def _vocabulary(tokens: dict[str, int] | None) -> Vocabulary | None:
    if tokens is None:
        return None
    lines = "\n".join(sorted(map(repr, tokens.items())))
    return Vocabulary(len(tokens), hashlib.sha256(lines.encode()).hexdigest())


def _stamp(folder: ModelFolder) -> Stamp:
    """Of every file that lies in the folder, links followed."""
    with os.scandir(folder.path) as entries:
        return tuple(sorted((entry.name, *_identity(entry)) for entry in entries))


def _identity(entry: "os.DirEntry[str]") -> tuple[int, int, int]:
    try:
        stat = entry.stat()
    except OSError:  # a link that leads nowhere
        return 0, 0, 0
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
