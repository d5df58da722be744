"""How far the server that drew a student's answers is from the student that learns from them.

The same weights give other log-probabilities in vLLM than here (other kernels, another precision), so what
is called on-policy is a little off it ("Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", Yao et al. 2025). With p the student that learns and q the one that drew, an answer y makes up for
that by importance weights. A divergence at position t is exact in its own token and depends on what
stands before it alone, so its weight is that of the prefix, truncated:

    w_t = min(Π_{i<t} p(y_i) / q(y_i), CAP)

Without truncation the weighted loss is, in expectation, that of answers drawn from p; truncation trades a
little of that for a bounded variance. Means keep the number of positions as their denominator: without
truncation weights are 1 on average.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

from recoup.schemas import RolloutReport

CAP = 2.0
MOST = 0.3
"""Mean |log p - log q| beyond which a server does not serve this student: rounding costs a few hundredths."""


def weights(drift: Sequence[float]) -> list[float]:
    """w_t of each position of an answer, from log p - log q of its tokens."""
    before = accumulate(drift[:-1], initial=0.0)
    return [math.exp(min(total, math.log(CAP))) for total in before]


@dataclass(frozen=True)
class Mismatch:
    """Sums over the answers that servers drew."""

    answers: int = 0
    tokens: int = 0
    absolute: float = 0.0
    divergence: float = 0.0
    """Σ r - 1 - log r with r = p/q: its mean estimates KL(q‖p), and no term is negative."""
    largest: float = 0.0
    truncated: int = 0

    def __add__(self, other: "Mismatch") -> "Mismatch":
        pairs = zip(astuple(self)[:4], astuple(other)[:4], strict=True)
        sums = [mine + theirs for mine, theirs in pairs]
        return Mismatch(*sums, max(self.largest, other.largest), self.truncated + other.truncated)

    @staticmethod
    def of(drifts: Iterable[Sequence[float]]) -> "Mismatch":
        return sum(map(_of, drifts), Mismatch())

    @property
    def mean(self) -> float:
        """Mean |log p - log q|, nats a token."""
        return self.absolute / max(1, self.tokens)

    def report(self) -> RolloutReport | None:
        """None where no server drew anything."""
        if not self.answers:
            return None
        return RolloutReport(
            answers=self.answers,
            tokens=self.tokens,
            mean_difference=self.mean,
            largest_difference=self.largest,
            kl=self.divergence / self.tokens,
            truncated=self.truncated / self.tokens,
            cap=CAP,
        )


def _of(drift: Sequence[float]) -> Mismatch:
    return Mismatch(
        answers=1,
        tokens=len(drift),
        absolute=math.fsum(map(abs, drift)),
        divergence=math.fsum(math.expm1(min(each, 50.0)) - each for each in drift),
        largest=max(map(abs, drift)),
        truncated=sum(weight >= CAP for weight in weights(drift)),
    )
