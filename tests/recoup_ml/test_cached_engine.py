"""A server is asked each prompt once, whoever asks and however often it breaks in between."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from recoup.schemas import Prompt
from recoup_ml.cached_engine import ASKED, CachedEngine
from recoup_ml.generate import Tick
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.sequences import Answered, Encoded


class Echo:
    """Answers with the prompt's last tokens; breaks when it has answered `most` batches."""

    def __init__(self, most: int = 1000) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._left = most

    def answer(self, prompts: Sequence[Encoded], max_new_tokens: int, tick: Tick) -> list[Answered]:
        if not self._left:
            raise ConnectionResetError
        self._left -= 1
        self.asked += [prompt.ids for prompt in prompts]
        return [
            Answered("", "", prompt.ids, "", (*prompt.ids[-max_new_tokens:], 2), "stop") for prompt in prompts
        ]


@pytest.fixture
def asked(prompts: list[Prompt]) -> list[Encoded]:
    """More than are asked together."""
    return [Encoded(prompts[0], (number % 100, number // 100, 7, 8)) for number in range(ASKED + 50)]


def answer(
    engine: Echo, asked: Sequence[Encoded], folder: Path, tokenizer: PreTrainedTokenizerFast, limit: int = 3
) -> tuple[list[Answered], list[int]]:
    told: list[int] = []
    return CachedEngine(engine, folder, "0a1b", tokenizer).answer(asked, limit, told.append), told


def test_after_a_crash_only_what_is_missing_is_asked(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    broken, second = Echo(most=1), Echo()
    with pytest.raises(ConnectionResetError):
        answer(broken, asked, tmp_path, tokenizer)
    found, told = answer(second, asked, tmp_path, tokenizer)
    assert len(broken.asked) == ASKED
    assert sorted(broken.asked + second.asked) == sorted(prompt.ids for prompt in asked)
    assert [item.prompt_ids for item in found] == [prompt.ids for prompt in asked]
    assert found == answer(Echo(), asked, tmp_path / "whole", tokenizer)[0]
    assert told == [ASKED, ASKED + 50]


def test_another_recovery_asks_nothing_again(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, _ = answer(Echo(), asked, tmp_path, tokenizer)
    idle = Echo(most=0)
    assert answer(idle, asked[::-1], tmp_path, tokenizer) == (first[::-1], [ASKED + 50])


def test_another_limit_is_another_question(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    answer(Echo(), asked, tmp_path, tokenizer)
    longer = Echo()
    answer(longer, asked, tmp_path, tokenizer, limit=4)
    assert len(longer.asked) == ASKED + 50


def test_a_prompt_that_comes_twice_is_asked_once(
    asked: list[Encoded], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = Echo()
    found, _ = answer(engine, [*asked[:5], *asked[:5]], tmp_path, tokenizer)
    assert len(engine.asked) == 5
    assert found[:5] == found[5:]


def test_a_recovery_asks_a_server_nothing_that_another_one_asked(
    server: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = replace(make_run("forgetful"), answers=tmp_path / "answers")
    with pytest.raises(ConnectionResetError):
        recover(run, open_journal(tmp_path / "diagnosed", breaks_in="generate"))
    served = replace(run, vllm_url=server.url)
    asked, left = [], []
    for name in ("first", "second"):
        shutil.copytree(tmp_path / "diagnosed" / "diagnose", tmp_path / name / "diagnose")
        with pytest.raises(ConnectionResetError):
            recover(served, open_journal(tmp_path / name, breaks_in="distil"))
        asked.append(len(server.bodies))
        left.append((tmp_path / name / "generate" / "train.jsonl").read_text())
    assert asked[0] == asked[1] > 0
    assert left[0] == left[1]
