import json
import struct

import numpy
import pytest
from safetensors.numpy import save_file

from recoup_jobs.errors import Unprocessable
from recoup_jobs.weights import read_header

SOUND = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture
def write(tmp_path):
    """Writes a file by hand, so that it can be wrong."""

    def write(header, data=bytes(24), length=None):
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
        return path

    return write


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        "half": numpy.zeros((5, 7), numpy.float16),
        "none": numpy.zeros((0, 3), numpy.float32),
        "scalar": numpy.array(1, numpy.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "half": ("F16", [5, 7]),
        "none": ("F32", [0, 3]),
        "scalar": ("I64", []),
    }


def test_weights_of_four_bits_are_read(write):
    assert "w" in read_header(write({"w": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"not json",
        b"\xff" * 8,
        {"w": 5},
        {"w": SOUND | {"dtype": "F31"}},
        {"w": SOUND | {"shape": [2, -3]}},
        {"w": SOUND | {"shape": [2, 2]}},
        {"w": SOUND | {"shape": [2**62, 2**62]}},
        {"w": SOUND | {"data_offsets": [0, 20]}},
        {"w": SOUND | {"data_offsets": [24, 0]}},
        {"w": SOUND | {"data_offsets": [8, 32]}},
        {"w": SOUND | {"extra": 1}},
        {"w": SOUND, "twin": SOUND},
    ],
)
def test_an_unsound_header_is_refused_in_a_sentence(write, header):
    with pytest.raises(Unprocessable, match=r"model\.safetensors is not a sound") as refusal:
        read_header(write(header))
    assert refusal.value.code == "corrupt_weights"


@pytest.mark.parametrize("length", [2**63, 10**9, 100])
def test_a_header_longer_than_the_file_is_never_read(write, length):
    with pytest.raises(Unprocessable, match="header claims"):
        read_header(write({"w": SOUND}, length=length))


@pytest.mark.parametrize("data", [bytes(23), bytes(25)])
def test_a_file_that_was_cut_or_grew_is_refused(write, data):
    with pytest.raises(Unprocessable, match="the file holds"):
        read_header(write({"w": SOUND}, data))


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(Unprocessable, match="header claims"):
        read_header(path)
