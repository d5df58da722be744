"""The compose stage: the teacher writes the prompts itself, where a recovery was given none.

A chat model that reads its own template up to the place where a user would speak goes on as a user
(Magpie, arXiv 2406.08464). What it writes there is sampled until there are enough prompts; one that does
not end by itself, is too short or too long, falls into a loop, holds marks of the template or was
written before is left out, and counted. The same seed gives the same prompts, however often the stage
was killed.

Nothing here judges how good or how hard a prompt is, as Magpie does with further models. What comes is
what the teacher holds for likely, in its own language and proportions: general ability, no special skill.
"""

import json
import math
from collections import Counter as Counts
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from recoup.schemas import ComposedPrompts, Composition, Message, Prompt
from recoup_ml import durable, models
from recoup_ml.alignment import GROUPS
from recoup_ml.errors import EmptyDataset, UnsupportedRequest
from recoup_ml.generate import LocalEngine
from recoup_ml.repetition import repetition_start
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.scores import repetition
from recoup_ml.sequences import Answered, Encoded, encode, from_row
from recoup_ml.splits import TEST_SHARE
from recoup_ml.turns import served
from recoup_ml.vllm_engine import VllmEngine

COMPOSED = "composed.jsonl"
ROUND = 256
"""Draws that are made, and kept, together."""
MOST_DRAWS = 5
"""For each prompt that is wanted."""
FEWEST = math.ceil(GROUPS / TEST_SHARE)
"""Prompts that leave enough of them to test: they have no kinds to hold out."""
FEWEST_TOKENS = 4
MOST_REPETITION = 0.3
"""Of four-grams that were there before in the same prompt."""
PLACE = "RECOUPUSERSPEAKS"

Draw = Callable[[int, int], list[Answered]]
"""(first, how many) → what the teacher wrote in these draws of an endless row."""


def compose(run: Run, journal: Journal, _done: Done, folder: Path) -> None:
    """Fills `folder` with the prompts, as a file that may be uploaded, and with how they came about."""
    spec = run.request.prompts
    assert isinstance(spec, ComposedPrompts)
    tokenizer = models.load_tokenizer(run.teacher)
    opening, closing = around_a_user(tokenizer)
    asked = Encoded(_prompt("?"), tuple(tokenizer(opening, add_special_tokens=False)["input_ids"]))
    tick = Counter(journal, spec.compose, "prompts").part(spec.compose)
    sieve = Sieve(tokenizer, closing, run.prompt_tokens)
    with served(run, journal):
        draw = _kept(_writer(run, tokenizer, asked, spec), folder / durable.UNFINISHED)
        for first in range(0, MOST_DRAWS * spec.compose, ROUND):
            for written in draw(first, ROUND):
                if len(sieve.kept) < spec.compose:
                    sieve.take(written)
            tick(len(sieve.kept))
            if len(sieve.kept) == spec.compose:
                break
    del draw
    models.release()
    if len(sieve.kept) < FEWEST:
        raise EmptyDataset(
            f"The teacher wrote {len(sieve.kept)} usable prompts in {sieve.drawn} draws ({sieve.reasons}); "
            f"{FEWEST} are needed. Give `prompts` as a file, or raise prompts.max_tokens."
        )
    found = sieve.composition(spec.compose, opening)
    (folder / "composition.json").write_text(found.model_dump_json())
    lines = (json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in sieve.kept)
    (folder / COMPOSED).write_text("".join(lines), "utf-8")


def prompts(done: Done) -> list[Prompt]:
    with (done["compose"] / COMPOSED).open(encoding="utf-8") as lines:
        return [_prompt(json.loads(line)["prompt"]) for line in lines]


def composition(done: Done) -> Composition | None:
    """How the prompts came about; none where they were given."""
    if "compose" not in done:
        return None
    return Composition.model_validate_json((done["compose"] / "composition.json").read_text())


def files(done: Done) -> dict[str, Path]:
    """What is handed over of it: prompts that another recovery may be given."""
    return {COMPOSED: done["compose"] / COMPOSED} if "compose" in done else {}


def around_a_user(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a conversation's template puts before a user's words, and what comes first behind them.

    Raises:
        UnsupportedRequest: there is no template, or it does not show a user's words as they are.
    """
    if tokenizer.chat_template is None:
        raise UnsupportedRequest(
            "prompts.compose needs a teacher with a chat template, for what it goes on from is the place "
            "where a user speaks; give `prompts` as a file."
        )
    turn = [{"role": "user", "content": PLACE}]
    shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    opening, found, rest = shown.partition(PLACE)
    if not found:
        raise UnsupportedRequest("The teacher's chat template does not show a user's words as they are.")
    return opening, next(iter(rest.split()), "")


class Sieve:
    """Keeps what is a prompt, each once, in the order in which they come; counts the rest by reason."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closing: str, most: int) -> None:
        self._tokenizer, self._closing, self._most = tokenizer, closing, most
        self._marks = {*tokenizer.all_special_ids}
        self._seen: set[str] = set()
        self._refused: Counts[str] = Counts()
        self._tokens = 0
        self.kept: list[str] = []

    @property
    def drawn(self) -> int:
        return len(self.kept) + self._refused.total()

    @property
    def reasons(self) -> str:
        return ", ".join(f"{reason} {times}" for reason, times in sorted(self._refused.items()))

    def take(self, written: Answered) -> None:
        self._tokens += len(written.answer_ids)
        text, ended = self._said(written)
        reason = self._objection(text) if ended else "unfinished"
        if reason:
            self._refused[reason] += 1
        else:
            self._seen.add(_gist(text))
            self.kept.append(text)

    def composition(self, wanted: int, opening: str) -> Composition:
        return Composition(
            wanted=wanted,
            kept=len(self.kept),
            drawn=self.drawn,
            refused=dict(sorted(self._refused.items())),
            tokens=self._tokens,
            opening=opening,
        )

    def _said(self, written: Answered) -> tuple[str, bool]:
        """The user's words, and whether they ended: by a token that ends, or by what follows a user."""
        stopped = written.finish == "stop"
        whole = self._tokenizer.decode(written.answer_ids[: -1 if stopped else None])
        if self._closing and self._closing in whole:
            return whole[: whole.index(self._closing)].strip(), True
        return whole.strip(), stopped

    def _objection(self, text: str) -> str | None:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._marks & {*ids}:
            return "marks_of_the_template"
        if len(ids) < FEWEST_TOKENS or not _gist(text):
            return "too_short"
        if repetition(ids) > MOST_REPETITION or repetition_start(ids) is not None:
            return "repetitive"
        if not encode([_prompt(text)], self._tokenizer, self._most):
            return "too_long"
        return "duplicate" if _gist(text) in self._seen else None


def _prompt(text: str) -> Prompt:
    return Prompt(messages=[Message(role="user", content=text)])


def _gist(text: str) -> str:
    """What makes two prompts the same: letters and digits, whatever their case and what stands between."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _writer(run: Run, tokenizer: PreTrainedTokenizerBase, asked: Encoded, spec: ComposedPrompts) -> Draw:
    """Whoever answers for the teacher, speaking as a user."""
    seed, limit = run.request.seed, min(spec.max_tokens, run.prompt_tokens)
    if run.vllm_urls:
        servers = VllmEngine(run.vllm_urls, tokenizer)
        return lambda first, many: servers.drawn(
            asked, range(first, first + many), limit, spec.temperature, seed
        )
    engine = LocalEngine(models.load(run.teacher), tokenizer, spec.temperature)

    def draw(first: int, many: int) -> list[Answered]:
        with torch.random.fork_rng():
            torch.manual_seed((seed << 24) + first)
            return engine.answer([asked] * many, limit, lambda _done: None)

    return draw


def _kept(draw: Draw, folder: Path) -> Draw:
    """The same draws, each made once however often the stage is killed."""

    def drawn(first: int, many: int) -> list[Answered]:
        path = folder / f"{first:08}.json"
        if not path.exists():
            rows = [asdict(written) for written in draw(first, many)]
            durable.place(path, lambda aside: aside.write_text(json.dumps(rows), "utf-8"))
        return [from_row(row) for row in json.loads(path.read_text("utf-8"))]

    return drawn
