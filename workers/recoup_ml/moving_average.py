"""A student's own past as its teacher: the exponential moving average of what trains.

    φ ← (1 - α) φ + α θ    after every step, from φ = θ on

θ being the student's trainable weights and α the rate. In self-distillation from demonstrations
(arXiv 2601.19897) φ scores the student's answers: a frozen teacher knows no more than what it is shown,
the student itself as teacher (α = 1) runs away, and what lies between takes up what was learnt and is steady.

Averaged is what the optimizer trains, in float32 where that is. For weights and norms that is the average of
the model's weights. For an adapter it is that of the factors A and B and not of their product, which as an
average of products would gain rank with every step: no adapter could hold it, and a matrix for each layer is
what an adapter is there to avoid. The two differ by the covariance of A and B over the steps that α still
remembers, a second order in how far both moved. The factors begin as the student's own, so that the teacher
begins as the student; averages that begin at zero would keep a share of nothing for long.

No second model is held: to be observed, the averages take the weights' places and give them back.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.trainable import Trainee


class MovingAverage:
    """The average of one trainee's weights, renewed at `rate`, in (0, 1]."""

    def __init__(self, trainee: Trainee, rate: float) -> None:
        self._trainee, self._rate = trainee, rate
        self.named = {name: weight.detach().clone() for name, weight in trainee.named.items()}
        """The averages, by the names of the weights."""

    @torch.no_grad()
    def renew(self) -> None:
        """Takes the present weights in."""
        for name, weight in self._trainee.named.items():
            self.named[name].lerp_(weight, self._rate)

    @torch.no_grad()
    def restore(self, named: Mapping[str, Tensor]) -> None:
        for name, average in self.named.items():
            average.copy_(named[name])

    @contextmanager
    def in_place(self) -> Iterator[PreTrainedModel]:
        """The student with the averages for weights; then it has its own again, bit for bit.

        Not for use while `parametrize.cached` holds on to weights that it computed before. Gradients
        and moments are those of the student all the while, so nothing is to be learnt in here.
        """
        self._exchange()
        try:
            self._trainee.settle()
            yield self._trainee.model
        finally:
            self._exchange()
            self._trainee.settle()

    def _exchange(self) -> None:
        for name, weight in self._trainee.named.items():
            weight.data, self.named[name] = self.named[name], weight.data
