"""An engine that remembers: what was answered before, in this recovery or another, is not asked again."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
from recoup_ml.generate import Engine, Tick
from recoup_ml.sequences import Answered, Encoded

ASKED = 256
"""Prompts that are asked together, whose answers are then safe."""


class CachedEngine:
    """Answers from the cache in a folder, and by an engine that answers greedily what is not there.

    Args:
        weights: what tells those of the engine's model from all others.
    """

    def __init__(
        self, engine: Engine, folder: Path, weights: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._engine, self._folder, self._weights, self._tokenizer = engine, folder, weights, tokenizer

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        manner = Manner(self._weights, {"max_new_tokens": max_new_tokens, "temperature": 0.0})
        keys = [manner.key(prompt.ids) for prompt in prompts]
        with AnswerCache(self._folder) as cache:
            found = {key: row for key in keys if (row := cache.get(key))}
            missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
            todo = [*missing]
            for start in range(0, len(todo), ASKED):
                tick(len(prompts) - len(todo) + start)
                some = {key: missing[key] for key in todo[start : start + ASKED]}
                cache.append(self._asked(some, max_new_tokens))
                # another recovery may have been faster: what stands in the cache is what all take
                found |= {key: row for key in some if (row := cache.get(key))}
        tick(len(prompts))
        return [self._answered(prompt, found[key]) for key, prompt in zip(keys, prompts, strict=True)]

    def _asked(self, missing: dict[str, Encoded], max_new_tokens: int) -> list[CachedAnswer]:
        given = self._engine.answer([*missing.values()], max_new_tokens, lambda _done: None)
        return [
            CachedAnswer(key, answer.answer_ids, answer.finish)
            for key, answer in zip(missing, given, strict=True)
        ]

    def _answered(self, prompt: Encoded, row: CachedAnswer) -> Answered:
        text = self._tokenizer.decode(row.answer_ids, skip_special_tokens=True)
        return Answered(prompt.kind, prompt.text, prompt.ids, text, row.answer_ids, row.finish)
