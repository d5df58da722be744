"""The tensors of a teacher by the names they have in its student, some of whose layers may be gone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.errors import IncompatibleModels
from recoup_ml.weights import BLOCK, Weights, block_of


class Twins:
    """Reads a teacher's tensors one at a time, as float32, by their student's names."""

    def __init__(self, teacher: Path, layer_map: Sequence[tuple[int, int]]) -> None:
        """`layer_map` holds (student layer, teacher layer), from 0."""
        self._weights, self.layers = Weights(teacher), dict(layer_map)

    def __contains__(self, name: str) -> bool:
        return self._twin(name) in self._weights

    def __getitem__(self, name: str) -> Tensor:
        """Raises IncompatibleModels where the teacher has no such tensor."""
        if name not in self:
            raise IncompatibleModels(
                f"The teacher has no tensor {self._twin(name)}, which is the student's {name}."
            )
        return self._weights[self._twin(name)].float()

    def pairs(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, parameter of `model`, its twin on the same device), of all that have one shape.

        Outside the blocks a parameter without such a twin is left out: a vocabulary may have grown.

        Raises:
            IncompatibleModels: a parameter of a block has no twin of its shape.
        """
        for name, parameter in model.named_parameters():
            if block_of(name) is None and name not in self:
                continue
            theirs = self[name].to(parameter.device)
            if theirs.shape == parameter.shape:
                yield name, parameter, theirs
            elif block_of(name) is not None:
                shapes = f"{tuple(parameter.shape)}, its teacher's {tuple(theirs.shape)}"
                raise IncompatibleModels(f"The student's {name} is {shapes}; both must have one shape.")

    def _twin(self, name: str) -> str:
        block = block_of(name)
        if block is None:
            return name
        return BLOCK.sub(lambda found: found[0].replace(found[1], str(self.layers[block])), name, count=1)
