"""Prompts and answers as token ids, and how they are laid into batches.

Axes in names, here and in the rest of the package: B sequences, T token positions,
N answer positions of several sequences one after another, D width, V vocabulary, L layers.

An answer position is one whose next token belongs to the answer: the last token of the
prompt and every answer token but the last. A sequence of P prompt and A answer tokens
has A of them, from P - 1 to P + A - 2.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recoup.schemas import Prompt

SPARE_TOKENS = 8


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
    drift: tuple[float, ...] | None = None
    """log p - log q of each token, of a student's own answer: of the student that is to learn from it, and of
    the server that drew it; none where the student drew it itself."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    def ending(self, tokens: int) -> "Answered":
        """The same text, of which the last `tokens` count as the answer, whoever said them."""
        ids = self.prompt_ids + self.answer_ids
        return replace(self, prompt_ids=ids[:-tokens], answer_ids=ids[-tokens:])


@dataclass(frozen=True)
class Batch:
    rows: tuple[int, ...]
    """Which sequences, by their index in what was batched."""
    ids_BT: Tensor
    mask_BT: Tensor | None
    """1 on tokens, 0 on padding; none in a pack, which has no padding."""
    answer_BT: Tensor
    """True on answer positions."""
    targets_N: Tensor
    """The answer tokens, sequence by sequence."""
    places_BT: Tensor | None = None
    """In a pack: the position of each token in its own sequence."""
    sees_BTT: Tensor | None = None
    """In a pack whose sequences share their first tokens: which tokens each may look at."""
    shared: int = 0
    """How many these are."""

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **tensors)


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


def reference_room(items: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest reference answer, and a few more; 0 where there is none."""
    references = [item.prompt.completion for item in items if item.prompt.completion]
    return max((len(tokenizer(text)["input_ids"]) + SPARE_TOKENS for text in references), default=0)


def with_answer(item: Encoded, tokenizer: PreTrainedTokenizerBase, most: int) -> Answered:
    """A prompt with its reference answer and an end token; the sequence is cut at `most` tokens."""
    text = item.prompt.completion or ""
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    room = most - len(item.ids)
    finish = "stop" if len(ids) <= room else "length"
    return Answered(item.kind, item.text, item.ids, text, ids[:room], finish)


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


def shared_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """How many first tokens all prompts have in common: those of a system prompt, mostly.

    A prompt's last token is not counted: its answer is read off there.
    """
    places = zip(*(ids[:-1] for ids in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, places))


def with_prompts(answers: Sequence[Answered]) -> list[Answered]:
    """The same texts, of which all counts as the answer but the tokens with which all prompts begin.

    And one more: what follows them is read off there.
    """
    first = 1 + shared_tokens(answer.prompt_ids for answer in answers)
    return [answer.ending(len(answer) - first) for answer in answers]


def packs(sequences: Sequence[Answered], tokens: int, shared: int = 0) -> Iterator[Batch]:
    """All sequences once, laid end to end in rows of at most `tokens`; a longer one has a row of its own.

    First fit, longest first. A model must be told by `places_BT` where a sequence begins and, where the first
    `shared` tokens of all stand once in each row, by `sees_BTT` what belongs together. Behind many of these a
    row holds half of `tokens` still.
    """
    behind = max(tokens - shared, tokens // 2)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        size = len(sequences[index]) - shared
        fits = next((row for row, left in enumerate(room) if left >= size), None)
        if fits is None:
            rows.append([])
            room.append(behind)
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= size
    yield from (pack(sequences, row, shared) for row in rows)


def pack(sequences: Sequence[Answered], rows: Sequence[int], shared: int = 0) -> Batch:
    """The named sequences one after another, as a batch of one row without padding."""
    chosen = [sequences[row] for row in rows]
    first = [*chosen[0].prompt_ids[:shared]]
    rest = [token for item in chosen for token in (*item.prompt_ids, *item.answer_ids)[shared:]]
    answer = [
        len(item.prompt_ids) - 1 <= place < len(item) - 1
        for item in chosen
        for place in range(shared, len(item))
    ]
    places = [torch.arange(shared), *(torch.arange(shared, len(item)) for item in chosen)]
    return Batch(
        rows=tuple(rows),
        ids_BT=torch.tensor([first + rest]),
        mask_BT=None,
        answer_BT=torch.tensor([[False] * shared + answer]),
        targets_N=torch.tensor([token for item in chosen for token in item.answer_ids]),
        places_BT=torch.cat(places).unsqueeze(0),
        sees_BTT=sees([len(part) for part in places]).unsqueeze(0) if shared else None,
        shared=shared,
    )


def sees(sizes: Sequence[int]) -> Tensor:
    """Of parts that lie one after another: each token sees those before it in its part and in the first one.

    [T, T], true where the one named by the row may look at the one named by the column.
    """
    part_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return ((part_T[:, None] == part_T) | (part_T == 0)).tril()


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
    rows = (asdict(sequence) for sequence in sequences)
    told = ({name: value for name, value in row.items() if value is not None} for row in rows)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told))


def read_jsonl(path: Path) -> list[Answered]:
    with path.open() as lines:
        return [from_row(json.loads(line)) for line in lines]


def from_row(row: dict[str, Any]) -> Answered:
    """An answer that was kept as JSON."""
    tuples = {name: tuple(value) for name, value in row.items() if isinstance(value, list)}
    return Answered(**row | tuples)
