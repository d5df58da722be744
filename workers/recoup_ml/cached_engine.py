"""An engine that remembers: what was answered before, in this recovery or another, is not asked again."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
from recoup_ml.generate import Tick
from recoup_ml.sequences import Answered, Encoded

SAFE_SECONDS = 0.2
"""From one append to the next: a fast server's answers share one, a slow one's have one each."""


class Asked(Protocol):
    """Who answers greedily, many prompts at a time: `VllmEngine`."""

    def each(
        self, prompts: Sequence[Encoded], max_new_tokens: int, take: Callable[[int, Answered], None]
    ) -> None:
        """Gives `take` the place of a prompt and its answer, as soon as it comes, in any order."""
        ...


class CachedEngine:
    """Answers from the cache in a folder, and by an engine what is not there.

    Args:
        weights: what tells those of the engine's model from all others.
    """

    def __init__(self, engine: Asked, folder: Path, weights: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine, self._folder, self._weights, self._tokenizer = engine, folder, weights, tokenizer

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        manner = Manner(self._weights, {"max_new_tokens": max_new_tokens, "temperature": 0.0})
        keys = [manner.key(prompt.ids) for prompt in prompts]
        with AnswerCache(self._folder) as cache:
            found = {key: row for key in keys if (row := cache.get(key))}
            missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
            known = len(prompts) - len(missing)
            tick(known)
            if missing:
                coming = _Coming(cache, [*missing], lambda done: tick(known + done))
                try:
                    self._engine.each([*missing.values()], max_new_tokens, coming.take)
                finally:
                    coming.make_safe()
                # another recovery may have been faster: what stands in the cache is what all take
                found |= {key: row for key in missing if (row := cache.get(key))}
        return [self._answered(prompt, found[key]) for key, prompt in zip(keys, prompts, strict=True)]

    def _answered(self, prompt: Encoded, row: CachedAnswer) -> Answered:
        text = self._tokenizer.decode(row.answer_ids, skip_special_tokens=True)
        return Answered(prompt.kind, prompt.text, prompt.ids, text, row.answer_ids, row.finish)


class _Coming:
    """Answers on their way into the cache; `keys` by the places of what is asked."""

    def __init__(self, cache: AnswerCache, keys: Sequence[str], tick: Tick) -> None:
        self._cache, self._keys, self._tick = cache, keys, tick
        self._rows: list[CachedAnswer] = []
        self._came, self._safe_at = 0, time.monotonic()

    def take(self, place: int, answer: Answered) -> None:
        self._rows.append(CachedAnswer(self._keys[place], answer.answer_ids, answer.finish))
        self._came += 1
        if time.monotonic() - self._safe_at >= SAFE_SECONDS:
            self.make_safe()
        self._tick(self._came)

    def make_safe(self) -> None:
        self._cache.append(self._rows)
        self._rows, self._safe_at = [], time.monotonic()
