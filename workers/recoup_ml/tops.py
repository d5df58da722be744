"""The teacher's likeliest tokens at the positions of many answers, on the disk.

Whoever found them, a teacher in this process or a server, they are kept in one form: `TopK.compact`,
with its tail. A position of 64 tokens takes 258 bytes, or 386 where the vocabulary has more than 65,536;
the last hidden state of a model of width 4096, which is the other thing to keep, takes 8 or 16 KiB.

Axes: N positions, K tokens kept.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from recoup_ml.targets import TopK

NAMES = ("ids_NK", "log_p_NK", "log_rest_N")


def write(path: Path, tops: Sequence[TopK]) -> None:
    """One for each answer, in order; all of one K, with their tails."""
    wide = any(top.ids_NK.dtype == torch.int32 for top in tops)
    tensors = {name: torch.cat([getattr(top, name) for top in tops]) for name in NAMES[1:]}
    tensors["ids_NK"] = torch.cat([top.ids_NK.int() if wide else top.ids_NK for top in tops])
    save_file(tensors, path, {"lengths": ",".join(str(len(top.ids_NK)) for top in tops)})


def read(path: Path) -> list[TopK]:
    with safe_open(path, "pt") as file:
        lengths = [int(length) for length in file.metadata()["lengths"].split(",")]
    tensors = load_file(path)
    return [TopK(*part) for part in zip(*(tensors[name].split(lengths) for name in NAMES), strict=True)]


def packed(top: TopK) -> bytes:
    """One of them, to be put away among others."""
    tensors: dict[str, Tensor] = {name: getattr(top, name) for name in NAMES}
    return save(tensors)


def unpacked(content: bytes) -> TopK:
    tensors = load(content)
    return TopK(*(tensors[name] for name in NAMES))
