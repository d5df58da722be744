"""A skill that is taught by demonstrations: how they are divided, and how well a model can do it.

A demonstration is a prompt with the answer that is wanted. Some train, some choose the checkpoint, and
some, of which none was trained on, decide: of each model they tell the loss on the answers that are wanted,
and how many it answers rightly by itself. Beside it stands what costs no training: the untaught model with a
few demonstrations in its context.

What a model loses over it is not measured here but by the general prompts of a recovery.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup.schemas import Match, Message, Prompt
from recoup_ml import models, results, scores
from recoup_ml.errors import EmptyDataset
from recoup_ml.generate import LocalEngine
from recoup_ml.observation import observe
from recoup_ml.run import Counter, Done, Run
from recoup_ml.sequences import Answered, Encoded, encode, with_answer
from recoup_ml.splits import Split, split_demonstrations
from recoup_ml.tasks import is_right, room

FILE = "skill.json"
SHOTS = (4, 2, 1)
"""Demonstrations in a context: as many as fit before the longest prompt."""
PASSES = 2
"""Of a model over demonstrations: it reads their answers, and gives its own."""


@dataclass(frozen=True)
class Skill:
    """What one model can do; every list has an entry for each demonstration."""

    nats: list[float]
    """-log p of the answer that is wanted."""
    tokens: list[int]
    """Of that answer."""
    right: list[bool]
    """Whether the model's own answer is right."""


@dataclass(frozen=True)
class Untaught:
    """The model as it was."""

    alone: Skill
    shots: int
    in_context: Skill | None
    """Shown so many demonstrations; None where that is not asked for, or not one fits."""


@dataclass(frozen=True)
class Demonstrations:
    """The same for every model."""

    items: list[Encoded]
    wanted: list[Answered]
    """The items with their answers."""
    match: Match
    max_new_tokens: int
    tokenizer: PreTrainedTokenizerBase

    def loss(self, model: PreTrainedModel) -> float:
        """Nats a token of the answers that are wanted."""
        nats = scores.answer_nats(observe(model, self.wanted, models.pad_id(self.tokenizer)), self.wanted)
        return math.fsum(nats) / sum(len(item.answer_ids) for item in self.wanted)

    def done_by(self, model: PreTrainedModel, counter: Counter) -> Skill:
        size = len(self.items)
        seen = observe(model, self.wanted, models.pad_id(self.tokenizer), tick=counter.part(size))
        engine = LocalEngine(model, self.tokenizer)
        given = engine.answer(self.items, self.max_new_tokens, counter.part(size))
        return Skill(
            nats=scores.answer_nats(seen, self.wanted),
            tokens=[len(item.answer_ids) for item in self.wanted],
            right=[
                is_right(said.answer, item.prompt.completion or "", self.match)
                for item, said in zip(self.items, given, strict=True)
            ],
        )


def split(run: Run) -> Split:
    """The same division of the demonstrations in every stage.

    Raises:
        EmptyDataset: none is left to train on.
    """
    wanted = run.request.evaluation
    asked = chain.from_iterable(task.prompts for task in run.tasks)
    most = wanted.test_sequences, wanted.validation_sequences
    found = split_demonstrations(run.teach, run.held_out, *most, asked)
    if not found.train:
        raise EmptyDataset("No demonstration is left to train on: all are held out, or stand in tasks.")
    return found


def held_out(run: Run, tokenizer: PreTrainedTokenizerBase) -> Demonstrations | None:
    """Those that decide; None where no skill is taught."""
    return _demonstrations(run, split(run).test, tokenizer) if run.teaches else None


def validation(run: Run, tokenizer: PreTrainedTokenizerBase) -> Demonstrations | None:
    """Those that choose the checkpoint, likewise."""
    return _demonstrations(run, split(run).validation, tokenizer) if run.teaches else None


def measure_untaught(
    run: Run, model: PreTrainedModel, asked: Demonstrations, counter: Counter, folder: Path
) -> None:
    """Leaves in `folder` what `model`, as it is, can do of the skill."""
    shots, shown = _in_context(run, asked) if run.request.evaluation.baselines else (0, None)
    found = Untaught(asked.done_by(model, counter), shots, shown and shown.done_by(model, counter))
    results.write(folder / FILE, found)


def untaught(done: Done) -> Untaught:
    return results.read(done["diagnose"] / FILE, Untaught)


def _demonstrations(
    run: Run, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> Demonstrations:
    items = encode(prompts, tokenizer, run.prompt_tokens)
    if not items or run.request.teach is None:
        raise EmptyDataset("No held-out demonstration is shorter than training.max_length.")
    match, limit = run.request.teach.match, run.request.generation.max_new_tokens
    return Demonstrations(
        items=items,
        wanted=[with_answer(item, tokenizer, run.request.training.max_length) for item in items],
        match=match,
        max_new_tokens=room(match, items, limit, tokenizer),
        tokenizer=tokenizer,
    )


def _in_context(run: Run, asked: Demonstrations) -> tuple[int, Demonstrations | None]:
    """The same demonstrations, each behind the same few that train, and how many these are."""
    train = split(run).train
    for shots in SHOTS:
        prompts = [_after(item.prompt, train[:shots]) for item in asked.items]
        items = encode(prompts, asked.tokenizer, run.prompt_tokens)
        if len(items) == len(prompts):
            return shots, _demonstrations(run, prompts, asked.tokenizer)
    return 0, None


def _after(prompt: Prompt, shown: Sequence[Prompt]) -> Prompt:
    """The conversation with others, answered, before it; instructions to the system are its own."""
    system = [message for message in prompt.messages if message.role == "system"]
    earlier = [
        turn
        for shot in shown
        for turn in (*shot.messages, Message(role="assistant", content=shot.completion or " "))
    ]
    turns = [message for message in (*earlier, *prompt.messages) if message.role != "system"]
    return prompt.model_copy(update={"messages": [*system, *turns]})
