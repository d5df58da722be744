"""An engine that remembers: what was answered before, in this recovery or another, is not asked again.

Nor is what the teacher held likely at the positions of an answer: it comes with an answer that is given
now, and is asked for by itself where the answer was remembered without it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from recoup_ml import tops
from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
from recoup_ml.generate import Tick, usable
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.targets import TopK

SAFE_SECONDS = 0.2
"""From one append to the next: a fast server's answers share one, a slow one's have one each."""


class Asked(Protocol):
    """Who answers greedily, many prompts at a time: `VllmEngine`."""

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
        ...

    def each_top(self, answers: Sequence[Answered], top_k: int, take: Callable[[int, TopK], None]) -> None:
        """Gives `take` the place of an answer and the likeliest tokens at its positions, in any order."""
        ...


class CachedEngine:
    """Answers from the cache in a folder, and by an engine what is not there.

    Args:
        weights: what tells those of the engine's model from all others.
    """

    def __init__(self, engine: Asked, folder: Path, weights: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine, self._folder, self._weights, self._tokenizer = engine, folder, weights, tokenizer

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        with AnswerCache(self._folder) as cache:
            return self._answer(cache, prompts, max_new_tokens, None, tick)

    def taught(
        self, prompts: Sequence[Encoded], max_new_tokens: int, top_k: int, tick: Tick
    ) -> tuple[list[Answered], list[TopK]]:
        """The usable answers, and for each the likeliest tokens at its positions.

        `tick` is told of two things for each prompt.
        """
        with AnswerCache(self._folder) as cache:
            answers = usable(self._answer(cache, prompts, max_new_tokens, top_k, tick))
            return answers, self._tops(cache, answers, top_k, lambda done: tick(len(prompts) + done))

    def _answer(
        self,
        cache: AnswerCache,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        top_k: int | None,
        tick: Tick,
    ) -> list[Answered]:
        manner = Manner(self._weights, {"max_new_tokens": max_new_tokens, "temperature": 0.0})
        keys = [manner.key(prompt.ids) for prompt in prompts]
        found = {key: row for key in keys if (row := cache.get(key))}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        known, asked = len(prompts) - len(missing), [*missing]
        tick(known)
        if missing:
            coming = _Coming(cache, lambda done: tick(known + done))

            def take(place: int, answer: Answered, top: TopK | None) -> None:
                row = CachedAnswer(asked[place], answer.answer_ids, answer.finish)
                coming.take(row, top and (self._top_key(answer, top_k), tops.packed(top)))

            with coming:
                self._engine.each([*missing.values()], max_new_tokens, top_k, take)
            # another recovery may have been faster: what stands in the cache is what all take
            found |= {key: row for key in missing if (row := cache.get(key))}
        return [self._answered(prompt, found[key]) for key, prompt in zip(keys, prompts, strict=True)]

    def _tops(self, cache: AnswerCache, answers: Sequence[Answered], top_k: int, tick: Tick) -> list[TopK]:
        keys = [self._top_key(answer, top_k) for answer in answers]
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if not cache.get_top(key)}
        known, asked = len(answers) - len(missing), [*missing]
        tick(known)
        if missing:
            coming = _Coming(cache, lambda done: tick(known + done))

            def take(place: int, top: TopK) -> None:
                coming.take(None, (asked[place], tops.packed(top)))

            with coming:
                self._engine.each_top([*missing.values()], top_k, take)
        return [tops.unpacked(cache.get_top(key) or b"") for key in keys]

    def _top_key(self, answer: Answered, top_k: int | None) -> str:
        return Manner(self._weights, {"top_k": top_k}).key(answer.prompt_ids, answer.answer_ids)

    def _answered(self, prompt: Encoded, row: CachedAnswer) -> Answered:
        text = self._tokenizer.decode(row.answer_ids, skip_special_tokens=True)
        return Answered(prompt.kind, prompt.text, prompt.ids, text, row.answer_ids, row.finish)


class _Coming:
    """Answers and tops on their way into the cache; what has come is safe when the block ends."""

    def __init__(self, cache: AnswerCache, tick: Tick) -> None:
        self._cache, self._tick = cache, tick
        self._rows: list[CachedAnswer] = []
        self._tops: list[tuple[str, bytes]] = []
        self._came, self._safe_at = 0, time.monotonic()

    def __enter__(self) -> "_Coming":
        return self

    def __exit__(self, *_: object) -> None:
        self._make_safe()

    def take(self, row: CachedAnswer | None, top: tuple[str, bytes] | None) -> None:
        self._rows += [row] if row else []
        self._tops += [top] if top else []
        self._came += 1
        if time.monotonic() - self._safe_at >= SAFE_SECONDS:
            self._make_safe()
        self._tick(self._came)

    def _make_safe(self) -> None:
        self._cache.append_tops(self._tops)  # before the answers: one that is there is not asked again
        self._cache.append(self._rows)
        self._rows, self._tops, self._safe_at = [], [], time.monotonic()
