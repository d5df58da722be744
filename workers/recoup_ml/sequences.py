"""Prompts and answers as token ids, and how they are laid into batches.

Axes in names, here and in the rest of the package: B sequences, T token positions,
N answer positions of several sequences one after another, D width, V vocabulary, L layers.

An answer position is one whose next token belongs to the answer: the last token of the
prompt and every answer token but the last. A sequence of P prompt and A answer tokens
has A of them, from P - 1 to P + A - 2.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recoup.schemas import Prompt


@dataclass(frozen=True)
class Encoded:
    """A prompt as the models see it."""

    prompt: Prompt
    ids: tuple[int, ...]

    @property
    def text(self) -> str:
        return self.prompt.messages[-1].content

    @property
    def kind(self) -> str:
        return self.prompt.kind or ""


@dataclass(frozen=True)
class Answered:
    """A prompt with one answer to it."""

    kind: str
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    finish: str
    """`stop` where the model ended its answer (the end token is part of `answer_ids`), else `length`."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Batch:
    rows: tuple[int, ...]
    """Which sequences, by their index in what was batched."""
    ids_BT: Tensor
    mask_BT: Tensor
    """1 on tokens, 0 on padding."""
    answer_BT: Tensor
    """True on answer positions."""
    targets_N: Tensor
    """The answer tokens, sequence by sequence."""

    def to(self, device: torch.device) -> "Batch":
        move = [getattr(self, name).to(device) for name in ("ids_BT", "mask_BT", "answer_BT", "targets_N")]
        return Batch(self.rows, *move)


def encode(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, most: int) -> list[Encoded]:
    """Prompts as token ids by the chat template, or as plain text; longer ones than `most` are dropped."""
    encoded = (Encoded(prompt, tuple(_ids(prompt, tokenizer))) for prompt in prompts)
    return [item for item in encoded if len(item.ids) <= most]


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turn["content"] for turn in turns) + "\n\n")["input_ids"]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(sequences: Sequence[Answered], pad_id: int, tokens: int) -> Iterator[Batch]:
    """All sequences once, of like length together, at most `tokens` padded tokens a batch."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(sequences[order[end]]) * (end + 1 - start) <= tokens:
            end += 1
        yield collate(sequences, order[start:end], pad_id)
        start = end


def collate(sequences: Sequence[Answered], rows: Sequence[int], pad_id: int) -> Batch:
    """The named sequences as one right-padded batch."""
    width = max(len(sequences[row]) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    answer_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        sequence = sequences[row]
        ids_BT[place, : len(sequence)] = torch.tensor(sequence.prompt_ids + sequence.answer_ids)
        mask_BT[place, : len(sequence)] = 1
        answer_BT[place, len(sequence.prompt_ids) - 1 : len(sequence) - 1] = True
    targets_N = torch.tensor([token for row in rows for token in sequences[row].answer_ids])
    return Batch(tuple(rows), ids_BT, mask_BT, answer_BT, targets_N)


def write_jsonl(path: Path, sequences: Sequence[Answered]) -> None:
    path.write_text(
        "".join(json.dumps(asdict(sequence), ensure_ascii=False) + "\n" for sequence in sequences)
    )


def read_jsonl(path: Path) -> list[Answered]:
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Answered(**row | {"prompt_ids": tuple(row["prompt_ids"]), "answer_ids": tuple(row["answer_ids"])})
        for row in rows
    ]
