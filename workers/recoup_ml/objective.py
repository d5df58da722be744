"""Which divergence a training makes small, as a value; what it computes is `divergence.py`'s.

Apart from that, so that a plan can be made where there is no torch.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Divergence:
    """Its name, and what belongs to it."""

    name: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "forward_kl"
    beta: float = 0.5
    """The teacher's share of the mixture in `jsd` and `skew_kl`; DistiLLM takes 0.1 for the latter."""
    temperature: float = 1.0
    """τ: softens both distributions."""

    def __str__(self) -> str:
        mixture = f" with β = {self.beta:g}" if self.name in {"jsd", "skew_kl"} else ""
        softened = f" at τ = {self.temperature:g}" if self.temperature != 1 else ""
        return self.name + mixture + softened
