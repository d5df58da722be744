"""Reads the header of a safetensors file without trusting it, and without loading a tensor.

The format (github.com/huggingface/safetensors): eight bytes with the header's length,
little endian; a JSON object name -> {dtype, shape, data_offsets}; the tensors' bytes. A
sound file has its tensors one after the other, without overlap or gap, to its last byte.
"""

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic_core import from_json

from recoup_jobs.errors import Unprocessable

LONGEST_HEADER = 100_000_000

BITS_BY_DTYPE = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E5M2FNUZ F8_E4M3FNUZ",
        16: "U16 I16 F16 BF16",
        32: "U32 I32 F32",
        64: "U64 I64 F64 C64",
    }.items()
    for dtype in dtypes.split()
}

Size = Annotated[int, Field(ge=0, lt=2**63)]


class TensorInfo(BaseModel):
    """One tensor's entry; `data_offsets` count from the end of the header."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: Annotated[list[Size], Field(max_length=64)]
    data_offsets: tuple[Size, Size]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS_BY_DTYPE[self.dtype] // 8


Header = TypeAdapter(dict[str, TensorInfo])


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; raises `Unprocessable` (`corrupt_weights`) for an unsound one."""
    raw, data_bytes = _read(path)
    try:
        named = from_json(raw)
        tensors = Header.validate_python({name: named[name] for name in named if name != "__metadata__"})
    except (ValueError, TypeError):
        raise _corrupt(path, "its header is no table of tensors") from None
    _check_layout(path, tensors, data_bytes)
    return tensors


def _read(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes follow it."""
    size = path.stat().st_size
    with path.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        return content.read(length), size - 8 - length


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end_of_last = tensor.data_offsets[0], end
        end = tensor.data_offsets[1]
        bits = BITS_BY_DTYPE.get(tensor.dtype)
        if bits is None:
            raise _corrupt(path, f"tensor {name[:200]} has the unknown type {tensor.dtype[:20]}")
        if begin != end_of_last or (end - begin) * 8 != math.prod(tensor.shape) * bits:
            raise _corrupt(path, f"tensor {name[:200]} does not lie where its shape and its neighbours say")
    if end != data_bytes:
        raise _corrupt(path, f"its tensors take {end} bytes, the file holds {data_bytes}")


def _corrupt(path: Path, why: str) -> Unprocessable:
    return Unprocessable("corrupt_weights", f"{path.name} is not a sound safetensors file: {why}")
