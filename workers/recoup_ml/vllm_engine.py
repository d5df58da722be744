"""Answers from vLLM servers, each prompt once, as many at a time as the servers take.

`Generator.rows` asks and yields what comes, in the order in which it comes: every row names the
question that it belongs to, so a store of answers can take them as they are. A question is on
its way in one request at a time and has its rows from one answer, so none is lost or doubled
when a server dies: the request is made again, of whoever is well. Questions are taken from an
iterator no faster than they are answered; a million of them need no more memory than a few
thousand.

Neighbours in alphabetical order share the beginnings that vLLM caches, so questions are asked in
that order, `LOOKAHEAD` at a time. Where the tokenizer is ours a question is token ids
(`/v1/completions`), so that the teacher reads exactly what the student will; else it is a
conversation, to which the server applies its own template (`/v1/chat/completions`).

`VllmEngine` is an `Engine` (`generate.py`) over it. Who is asked is decided in `replicas.py`.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import httpx2
from transformers import PreTrainedTokenizerBase

from recoup._retry import delay, seconds_of
from recoup.schemas import Message
from recoup_ml import log_probs
from recoup_ml.errors import TeacherContextTooShort, TeacherLogProbsTooFew, TeacherUnavailable
from recoup_ml.generate import Tick
from recoup_ml.replicas import Replica, Replicas, Served, unanswered
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.targets import TopK
from recoup_ml.window import Window

LOOKAHEAD = 4096
"""Questions that are put in order together."""
RETRIED = frozenset({408, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed; 429 is a refusal, and 503 with a time to wait."""


@dataclass(frozen=True)
class Question:
    place: int
    """Where its rows belong; the asker's own number."""
    prompt: tuple[int, ...] | tuple[Message, ...]
    """Token ids, or the messages of a conversation."""
    given: tuple[int, ...] = ()
    """An answer after a prompt of token ids, which is to be scored; one more token is generated meanwhile."""
    draw: int = 0
    """Tells the samples of a prompt that is asked several times from one another."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedily."""
    top_p: float = 1.0
    samples: int = 1
    """Answers to each question."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, beside those that the served model names itself."""
    seed: int = 0
    """With the prompt and its draw it settles the samples, whichever replica makes them."""
    model: str | None = None
    """Which model of the servers; none: the first that they list."""
    log_q: bool = False
    """Whether each token of an answer comes with the log-probability that it was drawn with."""
    top_k: int = 0
    """How many of the likeliest tokens are told at every position, and how likely they are."""


@dataclass(frozen=True)
class Row:
    """One answer to one question."""

    place: int
    sample: int
    """Which of `Sampling.samples`, from 0."""
    ids: tuple[int, ...]
    """The end token included, if it ended by one."""
    text: str
    finish: str
    """`stop` or `length`."""
    top: TopK | None
    """The likeliest tokens at each position of the answer, the given one if there is one."""
    log_q: tuple[float, ...] = ()
    """Of each token, if it was asked for."""


@dataclass(frozen=True)
class Patience:
    """How long a teacher that fails is waited for."""

    answer: float = 600.0
    """Seconds for one answer."""
    tries: int = 6
    """Times that one question is asked of servers that break or err."""
    outage: float = 300.0
    """Seconds without any replica, or with refusals alone."""


class Refused(Exception):
    """The server has too much to do; `seconds` is how long it wants to be left alone, if it says."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Failed(Exception):
    """No answer, or nonsense; another try may bring one."""


class Generator:
    """Asks the servers at `urls`; what it learns of their windows it keeps from one call to the next."""

    def __init__(self, urls: Sequence[str], patience: Patience) -> None:
        self._windows = {url.rstrip("/"): Window() for url in urls}
        self._patience = patience

    async def rows(self, questions: Iterable[Question], sampling: Sampling) -> AsyncIterator[Row]:
        """The rows of every question, those of one question together, in the order in which they come.

        Raises:
            TeacherUnavailable: no replica answers, or one question fails again and again.
            TeacherContextTooShort: prompt and answer are longer than the servers take.
            TeacherLogProbsTooFew: the servers do not tell so many of the likeliest tokens.
        """
        asked = _in_order(questions)
        finished: asyncio.Queue[asyncio.Task[list[Row]]] = asyncio.Queue()
        pending: set[asyncio.Task[list[Row]]] = set()
        async with Replicas(self._windows, self._patience.answer, self._patience.outage) as replicas:
            try:
                while True:
                    room = max(0, replicas.room - len(pending))
                    taken = list(islice(asked, room))
                    replicas.sated = len(taken) == room
                    for question in taken:
                        task = asyncio.create_task(self._ask(replicas, question, sampling))
                        task.add_done_callback(finished.put_nowait)
                        pending.add(task)
                    if not pending:
                        return
                    done = await finished.get()
                    pending.discard(done)
                    for row in done.result():
                        yield row
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def served(self) -> Served:
        """What the servers serve.

        Raises:
            TeacherUnavailable: none of them answers.
        """
        async with Replicas(self._windows, self._patience.answer, self._patience.outage) as replicas:
            return replicas.served

    async def _ask(self, replicas: Replicas, question: Question, sampling: Sampling) -> list[Row]:
        path, body = _request(question, sampling, replicas.served)
        tries, failing = 0, None
        while True:
            replica = await replicas.lease(failing)
            try:
                rows = _rows(await _post(replica, path, body), question, sampling)
            except Refused as refusal:
                replicas.refused(replica, delay(tries + 1, random.random(), refusal.seconds), str(refusal))
            except Failed as failure:
                reason = unanswered(replica.url, path, failure)
                replicas.failed(replica, reason)
                tries, failing = tries + 1, replica
                if tries >= self._patience.tries:
                    raise TeacherUnavailable(reason) from failure
                await asyncio.sleep(delay(tries, random.random()))
            else:
                replicas.answered(replica, len(question.given) or sum(len(row.ids) for row in rows))
                return rows


class VllmEngine:
    """Greedy answers of a served teacher, in the order of the prompts."""

    def __init__(
        self, urls: Sequence[str], tokenizer: PreTrainedTokenizerBase, patience: Patience | None = None
    ) -> None:
        """Raises `TeacherUnavailable` if none of the servers answers now: better than after an hour."""
        self._generator, self._scorer = (Generator(urls, patience or Patience()) for _ in range(2))
        self._tokenizer = tokenizer
        asyncio.run(self._generator.served())

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        found: dict[int, Answered] = {}

        def take(place: int, answer: Answered, _top: TopK | None) -> None:
            found[place] = answer
            tick(len(found))

        self.each(prompts, max_new_tokens, None, take)
        return [found[place] for place in range(len(prompts))]

    def each(
        self,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        top_k: int | None,
        take: Callable[[int, Answered, TopK | None], None],
    ) -> None:
        """Gives `take` the place of a prompt and its answer, as soon as it comes, in any order.

        With `top_k` also the likeliest tokens at the answer's positions.
        """
        sampling = Sampling(
            max_new_tokens, stop_ids=(self._tokenizer.eos_token_id,), top_k=self._most(top_k or 0)
        )
        questions = (Question(place, prompt.ids) for place, prompt in enumerate(prompts))
        rows = self._generator.rows(questions, sampling)
        asyncio.run(
            _each(rows, lambda row: take(row.place, self._answered(prompts[row.place], row), row.top))
        )

    def each_top(self, answers: Sequence[Answered], top_k: int, take: Callable[[int, TopK], None]) -> None:
        """Gives `take` the place of an answer and the likeliest tokens at its positions, in any order."""

        def scored(row: Row) -> None:
            assert row.top
            take(row.place, row.top)

        sampling = Sampling(1, top_k=self._most(top_k))
        questions = (
            Question(place, answer.prompt_ids, answer.answer_ids) for place, answer in enumerate(answers)
        )
        asyncio.run(_each(self._scorer.rows(questions, sampling), scored))

    def drawn(
        self, prompt: Encoded, draws: range, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answered]:
        """Sampled answers to one prompt, those of a seed's endless row at the places `draws`."""
        ends = (self._tokenizer.eos_token_id,)
        sampling = Sampling(max_new_tokens, temperature, stop_ids=ends, seed=seed)
        found: dict[int, Answered] = {}
        questions = (Question(draw, prompt.ids, draw=draw) for draw in draws)
        rows = self._generator.rows(questions, sampling)
        asyncio.run(_each(rows, lambda row: found.update({row.place: self._answered(prompt, row)})))
        return [found[draw] for draw in draws]

    def sampled(
        self, prompts: Sequence[Encoded], max_new_tokens: int, seed: int, model: str
    ) -> list[tuple[Answered, tuple[float, ...]]]:
        """A sample of the servers' `model` for each prompt, and log q of each of its tokens."""
        ends = (self._tokenizer.eos_token_id,)
        sampling = Sampling(max_new_tokens, 1.0, stop_ids=ends, seed=seed, model=model, log_q=True)
        found: dict[int, tuple[Answered, tuple[float, ...]]] = {}
        questions = (Question(place, prompt.ids, draw=place) for place, prompt in enumerate(prompts))

        def take(row: Row) -> None:
            found[row.place] = self._answered(prompts[row.place], row), row.log_q

        asyncio.run(_each(self._generator.rows(questions, sampling), take))
        return [found[place] for place in range(len(prompts))]

    def tops(self, answers: Sequence[Answered], top_k: int) -> list[TopK]:
        """The likeliest tokens at the positions of each answer, in their order."""
        found: dict[int, TopK] = {}
        self.each_top(answers, top_k, found.__setitem__)
        return [found[place] for place in range(len(answers))]

    def _most(self, top_k: int) -> int:
        """No server tells more than there are."""
        return min(top_k, len(self._tokenizer))

    def _answered(self, prompt: Encoded, row: Row) -> Answered:
        text = self._tokenizer.decode(row.ids, skip_special_tokens=True)
        return Answered(prompt.kind, prompt.text, prompt.ids, text, row.ids, row.finish)


async def _each(rows: AsyncIterator[Row], take: Callable[[Row], None]) -> None:
    async for row in rows:
        take(row)


def _in_order(questions: Iterable[Question]) -> Iterator[Question]:
    """The same questions, neighbours sharing long beginnings, without holding more than a few thousand."""
    rest = iter(questions)
    while some := list(islice(rest, LOOKAHEAD)):
        yield from sorted(some, key=_beginning)


def _beginning(question: Question) -> tuple[int, ...] | tuple[str, ...]:
    return tuple(part.content if isinstance(part, Message) else part for part in question.prompt)


def _request(question: Question, sampling: Sampling, served: Served) -> tuple[str, dict[str, Any]]:
    """Every setting is named: vLLM takes those that are not from the model's generation_config.json."""
    body = {
        "model": sampling.model or served.model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "n": sampling.samples,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_ids),
        "return_token_ids": True,
    }
    if sampling.log_q:
        body["logprobs"] = 0
    if sampling.top_k:
        body |= log_probs.request(sampling.top_k, question.given)
    if sampling.temperature:
        drawn = sampling.seed, question.prompt, question.draw
        body["seed"] = random.Random(repr(drawn)).getrandbits(31)
    if isinstance(question.prompt[0], Message):
        messages = [part.model_dump(include={"role", "content"}) for part in question.prompt]
        return "/v1/chat/completions", body | {"messages": messages}
    prompt, most = [*question.prompt, *question.given[:-1]], served.max_model_len
    if most and len(prompt) + sampling.max_new_tokens > most:
        raise TeacherContextTooShort(
            f"The teacher's server takes {most} tokens, prompt and answer together, and a prompt of "
            f"{len(prompt)} leaves no room for {sampling.max_new_tokens}: start it with a larger "
            "--max-model-len, or lower training.max_length."
        )
    return "/v1/completions", body | {"prompt": prompt}


async def _post(replica: Replica, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = await replica.client.post(path, json=body)
    except httpx2.HTTPError as error:
        raise Failed(str(error) or type(error).__name__) from error
    reason = f"{response.status_code} {response.text[:300]}"
    seconds = seconds_of(response.headers.get("retry-after"), datetime.now(UTC))
    if response.status_code == 429 or (response.status_code == 503 and seconds is not None):
        raise Refused(unanswered(replica.url, path, reason), seconds)
    if response.status_code in RETRIED:
        raise Failed(reason)
    if response.status_code == 400 and "logprobs" in body and "max allowed" in reason:
        raise TeacherLogProbsTooFew(
            f"The teacher at {replica.url} does not tell {body['logprobs']} log-probabilities a position: "
            "start it with a larger --max-logprobs, or lower method.top_k."
        )
    if response.status_code != 200:
        raise TeacherUnavailable(unanswered(replica.url, path, reason))
    try:
        return dict(response.json())
    except (ValueError, TypeError) as error:
        raise Failed(f"what came is no JSON object: {response.text[:300]}") from error


def _rows(answer: dict[str, Any], question: Question, sampling: Sampling) -> list[Row]:
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        rows = [_row(choice, question, sampling) for choice in choices]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Failed(
            f"an answer lacks {error}; it must come with its token ids, as vLLM gives them"
        ) from error
    if [row.sample for row in rows] != [*range(sampling.samples)]:
        raise Failed(f"{sampling.samples} answers were asked for, and {len(rows)} came")
    if odd := [row.finish for row in rows if row.finish not in {"stop", "length"}]:
        raise Failed(f"an answer ended by {odd[0]!r}")
    return rows


def _row(choice: dict[str, Any], question: Question, sampling: Sampling) -> Row:
    ids, top = tuple(choice["token_ids"]), None
    if sampling.top_k:
        top = log_probs.read(choice, sampling.top_k, len(question.prompt), len(question.given or ids))
    log_q = tuple(choice["logprobs"]["token_logprobs"]) if sampling.log_q else ()
    return Row(question.place, choice["index"], ids, _text(choice), choice["finish_reason"], top, log_q)


def _text(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"] or "")
