"""A server is asked each prompt once, whoever asks and however often it breaks in between."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recoup.schemas import Prompt
from recoup_ml import cached_engine
from recoup_ml.answer_cache import AnswerCache
from recoup_ml.cached_engine import CachedEngine
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.targets import TopK

ASKED = 306


def top_of(answer: Answered, top_k: int) -> TopK:
    """Certain of the answer, and of what stands beside it half so much each time."""
    ids_NK = torch.tensor(answer.answer_ids).unsqueeze(-1) + torch.arange(top_k)
    return TopK.given(ids_NK, -math.log(2) * torch.arange(1, top_k + 1).repeat(len(ids_NK), 1)).compact()


class Echo:
    """Answers with the prompt's last tokens, last prompt first; breaks when it has answered `most`."""

    def __init__(self, most: int = 1000) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.scored: list[tuple[int, ...]] = []
        self._most = most

    def each(
        self,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        top_k: int | None,
        take: Callable[[int, Answered, TopK | None], None],
    ) -> None:
        for place, prompt in reversed([*enumerate(prompts)]):
            if len(self.asked) == self._most:
                raise ConnectionResetError
            self.asked.append(prompt.ids)
            ids = (*prompt.ids[-max_new_tokens:], 2)
            answer = Answered("", "", prompt.ids, "", ids, "stop")
            take(place, answer, top_of(answer, top_k) if top_k else None)

    def each_top(self, answers: Sequence[Answered], top_k: int, take: Callable[[int, TopK], None]) -> None:
        for place, answer in enumerate(answers):
            self.scored.append(answer.prompt_ids)
            take(place, top_of(answer, top_k))


@pytest.fixture
def asked(prompts: list[Prompt]) -> list[Encoded]:
    return [Encoded(prompts[0], (number % 100, number // 100, 7, 8)) for number in range(ASKED)]


def answer(
    engine: Echo, asked: Sequence[Encoded], folder: Path, tokenizer: PreTrainedTokenizerFast, limit: int = 3
) -> tuple[list[Answered], list[int]]:
    told: list[int] = []
    return CachedEngine(engine, folder, "0a1b", tokenizer).answer(asked, limit, told.append), told


def test_after_a_crash_only_what_is_missing_is_asked(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    broken, second = Echo(most=201), Echo()
    with pytest.raises(ConnectionResetError):
        answer(broken, asked, tmp_path, tokenizer)
    found, told = answer(second, asked, tmp_path, tokenizer)
    assert len(broken.asked) == 201
    assert sorted(broken.asked + second.asked) == sorted(prompt.ids for prompt in asked)
    assert [item.prompt_ids for item in found] == [prompt.ids for prompt in asked]
    assert found == answer(Echo(), asked, tmp_path / "whole", tokenizer)[0]
    assert told == [*range(201, ASKED + 1)]


def test_an_answer_is_safe_before_the_next_one_comes(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed gets no chance to put anything away."""
    monkeypatch.setattr(cached_engine, "SAFE_SECONDS", 0.0)
    safe: list[int] = []

    def look(_done: int) -> None:
        with AnswerCache(tmp_path) as cache:
            safe.append(len(cache))

    CachedEngine(Echo(), tmp_path, "0a1b", tokenizer).answer(asked[:9], 3, look)
    assert safe == [*range(10)]


def test_another_recovery_asks_nothing_again(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, _ = answer(Echo(), asked, tmp_path, tokenizer)
    idle = Echo(most=0)
    assert answer(idle, asked[::-1], tmp_path, tokenizer) == (first[::-1], [ASKED])


def test_another_limit_is_another_question(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    answer(Echo(), asked, tmp_path, tokenizer)
    longer = Echo()
    answer(longer, asked, tmp_path, tokenizer, limit=4)
    assert len(longer.asked) == ASKED


def test_a_prompt_that_comes_twice_is_asked_once(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = Echo()
    found, _ = answer(engine, [*asked[:5], *asked[:5]], tmp_path, tokenizer)
    assert len(engine.asked) == 5
    assert found[:5] == found[5:]


def taught(
    engine: Echo, asked: Sequence[Encoded], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[Answered], list[TopK], list[int]]:
    told: list[int] = []
    cached = CachedEngine(engine, folder, "0a1b", tokenizer)
    return *cached.taught(asked, 3, 4, told.append), told


def is_of(answer: Answered, top: TopK) -> bool:
    return top.log_p_NK.tolist() == top_of(answer, 4).log_p_NK.tolist() and (
        top.ids_NK[:, 0].tolist() == list(answer.answer_ids)
    )


def test_what_the_teacher_holds_likely_comes_with_its_answers_and_is_not_asked_again(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = Echo()
    answers, found, told = taught(first, asked, tmp_path, tokenizer)
    assert len(first.asked) == ASKED
    assert not first.scored
    assert all(map(is_of, answers, found))
    assert told[-1] == 2 * ASKED
    answers, found, told = taught(Echo(most=0), asked[::-1], tmp_path, tokenizer)
    assert all(map(is_of, answers, found))
    assert told == [ASKED, 2 * ASKED]


def test_answers_that_are_remembered_alone_are_scored_and_not_given_again(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    answer(Echo(), asked[:5], tmp_path, tokenizer)
    later = Echo()
    answers, found, _ = taught(later, asked[:7], tmp_path, tokenizer)
    assert sorted(later.asked) == sorted(item.ids for item in asked[5:7])
    assert later.scored == [item.ids for item in asked[:5]]
    assert all(map(is_of, answers, found))


def test_a_recovery_asks_a_server_nothing_that_another_one_asked(
    server: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = replace(make_run("forgetful"), answers=tmp_path / "answers")
    with pytest.raises(ConnectionResetError):
        recover(run, open_journal(tmp_path / "diagnosed", breaks_in="generate"))
    served = replace(run, vllm_urls=(server.url,))
    asked, left = [], []
    for name in ("first", "second"):
        shutil.copytree(tmp_path / "diagnosed" / "diagnose", tmp_path / name / "diagnose")
        with pytest.raises(ConnectionResetError):
            recover(served, open_journal(tmp_path / name, breaks_in="distil"))
        asked.append(len(server.bodies))
        left.append((tmp_path / name / "generate" / "train.jsonl").read_text())
    assert asked[0] == asked[1] > 0
    assert left[0] == left[1]
