"""Terms of the training loss that pull the student's hidden states towards the teacher's, block by block.

    loss = divergence + weight · mean over blocks of (1 - CKA) + hidden_weight · mean of ‖s - t‖² / ‖t - t̄‖²

The first is the regulariser of CKA-QAD (arXiv 2606.05682): learning from outputs alone can leave the
inside crooked. The CKA is that of the answer positions of what goes through the student at once, debiased
by U-centring (Székely and Rizzo 2014), because the biased one is near 1 whatever the student does where
positions are fewer than channels. Its self-products are sums of squares, so a root is always defined. The
second term needs equal widths and no freedom of rotation: a student descends from its teacher. Both are
zero, slope included, for a student equal to its teacher.

Positions with a massive activation in either model count in neither. Tokens of one text do count as pairs
here: this is a direction to learn in; what is reported comes from `hsic.py`. The teacher stands beside
the student and is run once more over everything that is learnt from it.

Axes: N positions, D and E widths.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup.schemas import AlignmentSpec
from recoup_ml.alignment import ordinary
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.hidden import capture
from recoup_ml.models import last_hidden
from recoup_ml.sequences import Batch

MOST_POSITIONS = 512
"""At once: Gram matrices grow with their square."""
FEWEST_POSITIONS = 4


@dataclass(frozen=True)
class Regulariser:
    teacher: PreTrainedModel
    layer_map: Sequence[tuple[int, int]]
    """(student, teacher) states that are compared: 1 is after the first block."""
    weight: float
    hidden_weight: float

    def __str__(self) -> str:
        terms = {"(1 - CKA)": self.weight, "hidden distance": self.hidden_weight}
        return " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)

    @contextmanager
    def beside(self, student: PreTrainedModel, piece: Batch) -> Iterator[Callable[[], Tensor]]:
        """Reads the student while it runs over `piece` inside the block; then gives the weighted terms."""
        places_BT = spread(piece.answer_BT)
        with torch.no_grad(), capture(self.teacher, student.device) as theirs:
            theirs.positions_BT = places_BT
            last_hidden(self.teacher, piece.ids_BT, piece.mask_BT, piece.places_BT, piece.sees_BTT)
        with capture(student, student.device, detached=False) as mine:
            mine.positions_BT = places_BT
            yield lambda: self.terms(mine.states(), theirs.states())

    def terms(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Of the states of all layers, embeddings first: [N, D] each."""
        pairs = [(student[mine], teacher[theirs]) for mine, theirs in self.layer_map]
        stay_N = ordinary([[side.detach() for side in pair] for pair in pairs])
        total = pairs[0][0].new_zeros(())
        for x, y in pairs if int(stay_N.sum()) >= FEWEST_POSITIONS else ():
            if self.weight:
                total = total + self.weight * (1 - cka(x[stay_N], y[stay_N]))
            if self.hidden_weight:
                total = total + self.hidden_weight * distance(x[stay_N], y[stay_N])
        return total / len(pairs)


def wanted(spec: AlignmentSpec) -> bool:
    return spec.weight > 0 or spec.hidden_weight > 0


def compared(spec: AlignmentSpec, decoder_layers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks that the request names, with the teacher's that correspond, as numbers of states.

    Raises:
        UnsupportedRequest: none of them corresponds to a block of the teacher.
    """
    found = [
        (mine + 1, theirs + 1)
        for mine, theirs in decoder_layers
        if spec.layers == "all" or mine in spec.layers
    ]
    if not found:
        raise UnsupportedRequest("alignment.layers names no block that corresponds to one of the teacher.")
    return found


def cka(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """Debiased linear CKA, differentiable on both sides; 1 where a side does not vary.

    Raises:
        ValueError: fewer than 4 rows, or not the same number.
    """
    if len(x_ND) != len(y_NE) or len(x_ND) < FEWEST_POSITIONS:
        raise ValueError("CKA needs the same rows on both sides, 4 or more.")
    k_NN, l_NN = _u_centred(x_ND), _u_centred(y_NE)
    squares = k_NN.square().sum() * l_NN.square().sum()
    if squares == 0:
        return squares + 1
    return (k_NN * l_NN).sum() / squares.sqrt()


def distance(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Σ‖x - y‖² / Σ‖y - ȳ‖², differentiable on both sides; 0 where y does not vary."""
    apart, size = (x_ND - y_ND).square().sum(), (y_ND - y_ND.mean(0)).square().sum()
    return apart / size if size > 0 else apart * 0


def _u_centred(x_ND: Tensor) -> Tensor:
    """K_ij - Σ_l K_il / (n-2) - Σ_k K_kj / (n-2) + Σ_kl K_kl / ((n-1)(n-2)) off the diagonal, which is 0.

    Rows are centred and scaled first, which changes no CKA, and keeps float32 from cancelling.
    """
    n = len(x_ND)
    centred_ND = x_ND - x_ND.detach().mean(0)
    centred_ND = centred_ND / (centred_ND.detach().square().mean().sqrt() + torch.finfo(x_ND.dtype).tiny)
    gram_NN = centred_ND @ centred_ND.T / x_ND.shape[1]
    off_NN = 1 - torch.eye(n, dtype=x_ND.dtype, device=x_ND.device)
    gram_NN = gram_NN * off_NN
    rows_N = gram_NN.sum(1)
    whole = rows_N.sum() / ((n - 1) * (n - 2))
    return (gram_NN - (rows_N[:, None] + rows_N[None, :]) / (n - 2) + whole) * off_NN


def spread(answer_BT: Tensor) -> Tensor:
    """At most so many of the answer positions, evenly over the batch."""
    places = answer_BT.nonzero()
    if len(places) <= MOST_POSITIONS:
        return answer_BT
    kept = torch.linspace(0, len(places) - 1, MOST_POSITIONS, device=places.device).round().long()
    chosen_BT = torch.zeros_like(answer_BT)
    chosen_BT[tuple(places[kept].T)] = True
    return chosen_BT
