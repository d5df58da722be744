"""How the next token is chosen from a model's logits: OpenAI's settings, and vLLM's beside them.

Penalties are taken off first (by OpenAI's formula: presence once, frequency as often as the token was said;
repetition as in CTRL, arXiv 1909.05858, over prompt and answer), then the temperature divides, then min-p,
top-k and top-p leave the likelier tokens, as vLLM does. Axes: V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """One request's settings; the defaults are what changes nothing."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 and 0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    allowed_token_ids: Sequence[int] = ()
    """Nothing but these, where any are named."""


def choose(
    logits_V: Tensor,
    asked: Sampling,
    prompt: Sequence[int],
    said: Sequence[int],
    generator: torch.Generator,
) -> int:
    """The next token after `prompt` and `said`."""
    logits_V = _penalised(logits_V.double(), asked, prompt, said)
    if asked.temperature == 0:
        return int(logits_V.argmax())
    probability_V = (logits_V / asked.temperature).softmax(-1)
    probability_V = _likeliest(probability_V, asked)
    return int(torch.multinomial(probability_V, 1, generator=generator))


def _penalised(logits_V: Tensor, asked: Sampling, prompt: Sequence[int], said: Sequence[int]) -> Tensor:
    logits_V = logits_V.clone()
    if asked.repetition_penalty != 1.0 and (seen := sorted({*prompt, *said})):
        old_S = logits_V[seen]
        factor = asked.repetition_penalty
        logits_V[seen] = torch.where(old_S > 0, old_S / factor, old_S * factor)
    for token, count in Counter(said).items():
        logits_V[token] -= asked.presence_penalty + asked.frequency_penalty * count
    if asked.allowed_token_ids:
        others = torch.ones_like(logits_V, dtype=torch.bool)
        others[list(asked.allowed_token_ids)] = False
        logits_V[others] = -torch.inf
    return logits_V


def _likeliest(probability_V: Tensor, asked: Sampling) -> Tensor:
    """Zero for the tokens that min-p, top-k and top-p leave out; one token at least stays."""
    probability_V = torch.where(
        probability_V < asked.min_p * probability_V.max(), probability_V.new_zeros(()), probability_V
    )
    ranked_V, order_V = probability_V.sort(descending=True, stable=True)
    if asked.top_k > 0:
        ranked_V[asked.top_k :] = 0
    if asked.top_p < 1:
        ranked_V /= ranked_V.sum()
        ranked_V[ranked_V.cumsum(-1) - ranked_V >= asked.top_p] = 0
    return torch.zeros_like(ranked_V).scatter(-1, order_V, ranked_V)
