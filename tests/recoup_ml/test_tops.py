"""What is kept of a teacher's distributions comes back as it was."""

from pathlib import Path

import pytest
import torch

from recoup_ml import tops
from recoup_ml.targets import TopK


def drawn(positions: int, vocabulary: int) -> TopK:
    draw = torch.Generator().manual_seed(positions)
    return TopK.of(torch.randn(positions, vocabulary, generator=draw), 5).compact()


def same(one: TopK, other: TopK) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in tops.NAMES)
    return all(mine.tolist() == theirs.tolist() for mine, theirs in pairs)


@pytest.mark.parametrize("vocabularies", [(90, 90, 90), (90, 70_000, 90)], ids=["narrow", "one is wide"])
def test_every_answer_has_its_own_again(vocabularies: tuple[int, ...], tmp_path: Path) -> None:
    written = [drawn(size, vocabulary) for size, vocabulary in zip((3, 1, 7), vocabularies, strict=True)]
    tops.write(tmp_path / "tops.safetensors", written)
    read = tops.read(tmp_path / "tops.safetensors")
    assert len(read) == 3
    assert all(map(same, written, read))


def test_one_of_them_survives_being_packed() -> None:
    assert same(tops.unpacked(tops.packed(drawn(4, 90))), drawn(4, 90))
