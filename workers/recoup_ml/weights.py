"""The tensors of a model folder, one at a time, without building the model."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""Where a tensor's name says which decoder block it belongs to."""


class Weights:
    """Reads tensors by name from the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


def block_of(name: str) -> int | None:
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def zeros_filled(student: Path, recovered: Path) -> int:
    """How many exact zeros in the student's block matrices are something else in `recovered`."""
    before, after = Weights(student), Weights(recovered)
    filled = 0
    for name in before:
        if block_of(name) is not None and (weight := before[name]).dim() == 2:
            filled += int((after[name][weight == 0] != 0).sum())
    return filled


def sha256(folder: Path) -> str:
    """One hash over the bytes of all weight files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
