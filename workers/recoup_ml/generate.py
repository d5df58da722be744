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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from recoup_ml.errors import TeacherTruncated
from recoup_ml.kept_batches import Given, KeptBatches, States
from recoup_ml.models import can_share, head, pad_id
from recoup_ml.observation import Observation
from recoup_ml.sequences import Answered, Encoded, shared_tokens, with_prompts

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
        found = {row: given for row, given, _ in self._generated(prompts, max_new_tokens, tick, "none")}
        return [found[row] for row in range(len(prompts))]

    def observed(
        self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick, whole: bool = False
    ) -> tuple[list[Answered], Observation]:
        """The usable answers, and the model as `observe` would find it on them, without a second pass.

        With `whole` as it would find it on `with_prompts` of them.
        """
        made = self._generated(prompts, max_new_tokens, tick, "whole" if whole else "answer")
        found = {row: (given, seen) for row, given, seen in made}
        kept = set(usable([given for given, _ in found.values()]))
        pairs = [found[row] for row in range(len(prompts)) if found[row][0] in kept]
        answers = [given for given, _ in pairs]
        learnt = with_prompts(answers) if whole else answers
        hidden = [seen[-len(item.answer_ids) :] for (_, seen), item in zip(pairs, learnt, strict=True)]
        return answers, Observation(hidden, head(self._model).detached(), [])

    def _generated(
        self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick, states: States
    ) -> Iterator[tuple[int, Answered, Tensor]]:
        """(prompt's place, its answer, the last hidden states that are wanted [N, D]), by length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            given = self._batch([prompts[row] for row in rows], max_new_tokens, states)
            for row, (answer_ids, hidden_ND) in zip(rows, given, strict=True):
                yield row, self._answered(prompts[row], answer_ids), hidden_ND
            tick(start + len(rows))

    def _batch(self, prompts: Sequence[Encoded], max_new_tokens: int, states: States) -> list[Given]:
        """Answers to prompts of like length, as they were kept or made anew, on the CPU."""
        if self._kept and (found := self._kept.get(prompts, max_new_tokens, states)):
            return found
        ids, first_SD, hidden_BTD = self._generate(prompts, max_new_tokens, states == "whole")
        given: list[Given] = []
        for prompt, answer_ids, hidden_TD in zip(prompts, ids, hidden_BTD.cpu(), strict=True):
            end, last = self._end(answer_ids), len(hidden_TD) - len(answer_ids)
            if states == "whole":
                rest = last + 1 - (len(prompt.ids) - len(first_SD))  # where its padding ends
                seen_ND = torch.cat([first_SD, hidden_TD[rest : last + end]])
            else:
                seen_ND = hidden_TD[last : last + (end if states == "answer" else 0)].clone()
            given.append((answer_ids[:end], seen_ND))
        if self._kept:
            self._kept.put(prompts, max_new_tokens, states, given)
        return given

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Encoded], max_new_tokens: int, whole: bool
    ) -> tuple[list[list[int]], Tensor, Tensor]:
        """Tokens that follow, last hidden states of what all prompts begin with, [S, D], and those after it.

        The latter are [B, T, D]: from a prompt's last token on or, of the `whole`, from its padding on.
        """
        shared = shared_tokens(prompt.ids for prompt in prompts) if self._shares else 0
        first_BT = torch.tensor([prompt.ids[:shared] for prompt in prompts], dtype=torch.long)
        rest = [prompt.ids[shared:] for prompt in prompts]
        rest_BT, mask_BT = _left_padded(rest, pad_id(self._tokenizer))
        ids_BT = torch.cat([first_BT, rest_BT], 1)
        mask_BT = torch.cat([torch.ones_like(first_BT), mask_BT], 1)
        passed = self._passed(first_BT) if shared else None
        with _last_states(self._model, whole) as states:
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
                past_key_values=passed.past_key_values if passed else None,
            )
        hidden_BTD = torch.cat(states, dim=1)
        first_SD = passed.last_hidden_state[0].cpu() if passed else hidden_BTD[0, :0].cpu()
        return output_BT[:, ids_BT.shape[1] :].tolist(), first_SD, hidden_BTD

    def _passed(self, first_BT: Tensor) -> BaseModelOutputWithPast:
        """What all prompts begin with, computed once; its keys and values as those of a batch."""
        ids_BT = first_BT[:1].to(self._model.device)
        output: BaseModelOutputWithPast = self._model.get_decoder()(input_ids=ids_BT, use_cache=True)
        assert output.past_key_values is not None
        output.past_key_values.batch_repeat_interleave(len(first_BT))
        return output

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
def _last_states(model: PreTrainedModel, whole: bool) -> Iterator[list[Tensor]]:
    """Inside the block: the last hidden states of every pass, [B, T, D], or those of its last token alone."""
    seen: list[Tensor] = []
    start = 0 if whole else -1
    hook = model.get_decoder().register_forward_hook(
        lambda _module, _args, output: seen.append(output.last_hidden_state[:, start:].clone())
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
