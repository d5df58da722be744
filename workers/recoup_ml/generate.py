"""Answers from a model: the teacher's, to learn from, and the student's, to look at.

Two engines answer alike, greedily and on token ids: `LocalEngine` runs transformers in this
process, batched, with a key-value cache; `VllmEngine` (`vllm_engine.py`) asks vLLM servers, where
a large teacher belongs. Greedy answers make a recovery repeatable on one machine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml.errors import TeacherTruncated
from recoup_ml.kept_batches import Given, KeptBatches
from recoup_ml.models import can_share, head, pad_id
from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered, Encoded, shared_tokens

Tick = Callable[[int], None]
BATCH = 64


class Engine(Protocol):
    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        """One answer to each prompt, in their order; `tick` is told how many are done."""
        ...


class LocalEngine:
    """Answers with a model in this process: greedily, or sampled at a temperature (torch's global seed).

    Args:
        kept: where greedy answers are kept batch by batch, and found again after a crash.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 0.0,
        kept: KeptBatches | None = None,
    ) -> None:
        self._model, self._tokenizer, self._kept = model, tokenizer, kept
        self._how = (
            {"do_sample": True, "temperature": temperature}
            if temperature
            else {"do_sample": False, "temperature": None}
        )
        self._end_ids, self._shares = end_ids(model, tokenizer), can_share(model)

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        found = {row: given for row, given, _ in self._generated(prompts, max_new_tokens, tick, False)}
        return [found[row] for row in range(len(prompts))]

    def observed(
        self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick
    ) -> tuple[list[Answered], Observation]:
        """The usable answers, and the model as `observe` would find it on them, without a second pass."""
        made = self._generated(prompts, max_new_tokens, tick, True)
        found = {row: (given, seen) for row, given, seen in made}
        kept = set(usable([given for given, _ in found.values()]))
        pairs = [found[row] for row in range(len(prompts)) if found[row][0] in kept]
        hidden = [hidden_AD for _, hidden_AD in pairs]
        return [given for given, _ in pairs], Observation(hidden, head(self._model).detached(), [])

    def _generated(
        self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick, observed: bool
    ) -> Iterator[tuple[int, Answered, Tensor]]:
        """(prompt's place, its answer, last hidden states at the answer's positions [A, D]), by length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            given = self._batch([prompts[row] for row in rows], max_new_tokens, observed)
            for row, (answer_ids, hidden_AD) in zip(rows, given, strict=True):
                yield row, self._answered(prompts[row], answer_ids), hidden_AD
            tick(start + len(rows))

    def _batch(self, prompts: Sequence[Encoded], max_new_tokens: int, observed: bool) -> list[Given]:
        """Answers to prompts of like length, as they were kept or made anew, on the CPU."""
        if self._kept and (found := self._kept.get(prompts, max_new_tokens, observed)):
            return found
        ids, hidden_BAD = self._generate(prompts, max_new_tokens)
        given: list[Given] = []
        for answer_ids, hidden_AD in zip(ids, hidden_BAD.cpu(), strict=True):
            end = self._end(answer_ids)
            given.append((answer_ids[:end], hidden_AD[:end, : None if observed else 0].clone()))
        if self._kept:
            self._kept.put(prompts, max_new_tokens, observed, given)
        return given

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Encoded], max_new_tokens: int) -> tuple[list[list[int]], Tensor]:
        shared = shared_tokens(prompt.ids for prompt in prompts) if self._shares else 0
        first_BT = torch.tensor([prompt.ids[:shared] for prompt in prompts], dtype=torch.long)
        rest = [prompt.ids[shared:] for prompt in prompts]
        rest_BT, mask_BT = _left_padded(rest, pad_id(self._tokenizer))
        ids_BT, mask_BT = (
            torch.cat([first_BT, rest_BT], 1),
            torch.cat([torch.ones_like(first_BT), mask_BT], 1),
        )
        passed = self._passed(first_BT) if shared else None
        with _last_states(self._model) as states_BD:
            output_BT = self._model.generate(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
                max_new_tokens=max_new_tokens,
                **self._how,
                top_p=None,
                top_k=0 if self._how["do_sample"] else None,
                repetition_penalty=1.0,
                eos_token_id=self._end_ids,
                pad_token_id=pad_id(self._tokenizer),
                past_key_values=passed,
            )
        return output_BT[:, ids_BT.shape[1] :].tolist(), torch.stack(states_BD, dim=1)

    def _passed(self, first_BT: Tensor) -> Cache:
        """Keys and values of what all prompts begin with, computed once."""
        ids_BT = first_BT[:1].to(self._model.device)
        cache: Cache = self._model.get_decoder()(input_ids=ids_BT, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(first_BT))
        return cache

    def _end(self, ids: Sequence[int]) -> int:
        """How many of the tokens belong to the answer: up to the first that ends it."""
        return next((place + 1 for place, token in enumerate(ids) if token in self._end_ids), len(ids))

    def _answered(self, prompt: Encoded, ids: Sequence[int]) -> Answered:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        finish = "stop" if ids and ids[-1] in self._end_ids else "length"
        return Answered(prompt.kind, prompt.text, prompt.ids, text, tuple(ids), finish)


def usable(answers: Sequence[Answered]) -> list[Answered]:
    """The answers that hold text; an empty one teaches nothing.

    Raises:
        TeacherTruncated: none does.
    """
    kept = [answer for answer in answers if answer.answer.strip()]
    if not kept:
        raise TeacherTruncated(f"None of the teacher's {len(answers)} answers holds any text.")
    return kept


def require_an_end(answers: Sequence[Answered], limit: int) -> None:
    """Refuses answers none of which shows the student where to stop.

    Raises:
        TeacherTruncated: all were cut at `limit` tokens.
    """
    if answers and all(answer.finish == "length" for answer in answers):
        raise TeacherTruncated(
            f"Every one of the teacher's {len(answers)} answers was cut at {limit} tokens, so none has "
            "an end to learn: raise generation.max_new_tokens."
        )


@contextmanager
def _last_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside the block: what the model's head is given for the last token of every pass, [B, D] each."""
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(
        lambda _module, _args, output: seen.append(output.last_hidden_state[:, -1].clone())
    )
    try:
        yield seen
    finally:
        hook.remove()


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the model's generation config or its tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return [token for token in {*listed, tokenizer.eos_token_id} if token is not None]
