"""The measures of one model on held-out data, unit by unit, so that intervals can be made later.

Behaviour is measured against the teacher on the teacher's own greedy answers: token
KL(teacher‖student), top-1 agreement, perplexity. Perplexity alone misleads (cross-entropy
can take it below the teacher's own while the divergence grows), so the divergence leads.
Natural text in bits per character guards general language; repetition is seq-rep-4 of
Welleck et al. 2019 (arXiv 1908.04319); a kept skill is scored by exact match.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml.divergence import forward_kl
from recoup_ml.models import Head, head, last_hidden
from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered

CHUNK = 512


@dataclass(frozen=True)
class Scores:
    """One model against the teacher; every list has an entry for each test sequence."""

    kl: list[list[float]]
    """Token KL(teacher‖model), nats, of each answer position."""
    agreement: list[int]
    """Positions at which both models' likeliest token is the same."""
    token_nll: list[list[float]]
    """-log p(token) of each answer token under the model, nats."""

    @property
    def nll(self) -> list[float]:
        """-log p(answer) of each sequence, nats."""
        return [math.fsum(sequence) for sequence in self.token_nll]

    @property
    def mean_kl(self) -> float:
        """Mean over all answer positions, nats; infinity if any is not finite."""
        values = [value for sequence in self.kl for value in sequence]
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


@dataclass(frozen=True)
class Window:
    """A stretch of natural text and what a model needed to write it."""

    bits: float
    characters: int


@torch.inference_mode()
def compare(teacher: Observation, model: Observation, sequences: Sequence[Answered]) -> Scores:
    """Scores `model` against `teacher`, both observed on the same `sequences`."""
    teacher_head = teacher.head.like(model.head.weight_VD)
    kl, agreement, nll = [], [], []
    for row, sequence in enumerate(sequences):
        targets_N = torch.tensor(sequence.answer_ids)
        values = [
            _compare(t_ND, teacher_head, m_ND, model.head, part_N)
            for t_ND, m_ND, part_N in zip(
                teacher.hidden[row].split(CHUNK),
                model.hidden[row].split(CHUNK),
                targets_N.split(CHUNK),
                strict=True,
            )
        ]
        kl.append([value for part, _, _ in values for value in part])
        agreement.append(sum(agree for _, agree, _ in values))
        nll.append([value for _, _, part in values for value in part])
    return Scores(kl, agreement, nll)


@torch.inference_mode()
def greedy_share(model: Observation, sequences: Sequence[Answered]) -> float:
    """The share of all answer tokens that `model` itself holds to be the likeliest."""
    same = tokens = 0
    for hidden_ND, sequence in zip(model.hidden, sequences, strict=True):
        likeliest_N = model.head(hidden_ND.to(model.head.weight_VD)).argmax(-1).cpu()
        same += int((likeliest_N == torch.tensor(sequence.answer_ids)).sum())
        tokens += len(sequence.answer_ids)
    return same / tokens


@torch.inference_mode()
def answer_nats(model: Observation, sequences: Sequence[Answered]) -> list[float]:
    """-log p of each sequence's answer under the model, nats."""
    return [
        math.fsum(
            value
            for part_ND, part_N in zip(
                hidden_ND.split(CHUNK), torch.tensor(sequence.answer_ids).split(CHUNK), strict=True
            )
            for value in _nll(model.head(part_ND.to(model.head.weight_VD)), part_N)
        )
        for hidden_ND, sequence in zip(model.hidden, sequences, strict=True)
    ]


def _nll(logits_NV: Tensor, targets_N: Tensor) -> list[float]:
    targets_N = targets_N.to(logits_NV.device)
    nll: list[float] = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").tolist()
    return nll


def _compare(
    teacher_ND: Tensor, teacher_head: Head, model_ND: Tensor, model_head: Head, targets_N: Tensor
) -> tuple[list[float], int, list[float]]:
    teacher_NV = teacher_head(teacher_ND.to(teacher_head.weight_VD))
    model_NV = model_head(model_ND.to(model_head.weight_VD))
    same = int((teacher_NV.argmax(-1) == model_NV.argmax(-1)).sum())
    return forward_kl(teacher_NV, model_NV).tolist(), same, _nll(model_NV, targets_N)


def text_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[tuple[int, ...]]:
    """`count` stretches of `length` tokens, spread evenly over `texts`; fewer if there is less text."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    available = len(ids) // length
    step = max(1, available // count)
    return [tuple(ids[at * length : (at + 1) * length]) for at in range(0, available, step)][:count]


@torch.inference_mode()
def natural_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Sequence[tuple[int, ...]]
) -> list[Window]:
    """Bits that `model` needs for each window's tokens but the first, and the characters they spell."""
    scored = []
    for start in range(0, len(windows), 16):
        ids_BT = torch.tensor(windows[start : start + 16], device=model.device)
        hidden_BTD = last_hidden(model, ids_BT, torch.ones_like(ids_BT))
        for ids_T, hidden_TD in zip(ids_BT, hidden_BTD, strict=True):
            logits_TV = head(model)(hidden_TD[:-1])
            nats = float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
            scored.append(Window(nats / math.log(2), len(tokenizer.decode(ids_T[1:]))))
    return scored


def repetition(answer_ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: the share of an answer's n-grams that repeat an earlier one; 0 if it has none."""
    grams = [tuple(answer_ids[at : at + n]) for at in range(len(answer_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def matches(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Exact match after white space at both ends is dropped."""
    return [
        answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)
    ]
