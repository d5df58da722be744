"""A teacher that writes its own prompts: what is kept of them, and that they are treated like any others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Composition
from recoup_ml import compose, models
from recoup_ml.compose import Sieve, around_a_user
from recoup_ml.errors import EmptyDataset, UnsupportedRequest
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.sequences import Answered

OPENING = "<|user|> "
END = 2


def written(tokenizer: PreTrainedTokenizerFast, text: str, finish: str = "stop") -> Answered:
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], *[END] * (finish == "stop"))
    return Answered("", "", (1,), text, ids, finish)


@pytest.fixture
def sieve(tokenizer: PreTrainedTokenizerFast) -> Sieve:
    return Sieve(tokenizer, around_a_user(tokenizer)[1], 14)


def composed(run: Run, journal: Any) -> tuple[list[str], Composition]:
    """What was written before the recovery broke in its first stage after that."""
    with pytest.raises(ConnectionResetError):
        recover(run, journal)
    done = {"compose": journal.place / "compose"}
    found = compose.composition(done)
    assert found
    return [prompt.messages[0].content for prompt in compose.prompts(done)], found


def seeds(server: Any) -> list[int]:
    """Of the draws that it made."""
    return sorted(body["seed"] for body in server.bodies if "seed" in body)


def test_what_a_template_puts_around_a_user_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    assert around_a_user(tokenizer) == (OPENING, "</s>")


def test_a_teacher_without_a_template_cannot_speak_as_a_user(teacher: Path) -> None:
    plain = models.load_tokenizer(teacher)
    plain.chat_template = None
    with pytest.raises(UnsupportedRequest, match="chat template"):
        around_a_user(plain)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("copy : red blue green", "length", "unfinished"),
        ("copy : red", "stop", "too_short"),
        (": : : : :", "stop", "too_short"),
        ("copy : <|assistant|> red blue", "stop", "marks_of_the_template"),
        ("copy : " + "red blue " * 6, "stop", "repetitive"),
        ("copy : bird fish one two three seven nine stone tree river", "stop", "too_long"),
        ("copy red : blue green", "stop", "duplicate"),
    ],
)
def test_what_is_no_prompt_is_left_out_and_counted(
    text: str, finish: str, reason: str, sieve: Sieve, tokenizer: PreTrainedTokenizerFast
) -> None:
    sieve.take(written(tokenizer, "copy : red blue green"))
    sieve.take(written(tokenizer, text, finish))
    found = sieve.composition(9, OPENING)
    assert sieve.kept == ["copy : red blue green"]
    assert (found.drawn, found.kept, found.refused) == (2, 1, {reason: 1})


def test_words_that_end_where_the_template_goes_on_are_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """As with a template whose user ends by text that is no token that ends an answer."""
    sieve = Sieve(tokenizer, "river", 24)
    sieve.take(written(tokenizer, "copy : red blue river <|assistant|> red", "length"))
    assert sieve.kept == ["copy : red blue"]


def test_a_server_writes_the_same_prompts_for_a_seed_and_others_for_another(
    author: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    found = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        run = make_run("finetuned", prompts={"compose": 100}, seed=seed)
        served = replace(run, prompts=[], vllm_urls=(author.url,))
        texts, counts = composed(served, open_journal(tmp_path / name, breaks_in="diagnose"))
        assert len(texts) == len(set(texts)) == counts.kept == counts.wanted == 100
        assert counts.drawn == 100 + sum(counts.refused.values())
        assert counts.refused["too_short"] > 0
        assert (counts.opening, counts.tokens > 0) == (OPENING, True)
        found[name] = texts
    assert found["first"] == found["again"]
    assert found["first"] != found["other"]


def test_a_stage_that_was_killed_draws_nothing_twice(
    author: Any,
    make_run: Callable[..., Run],
    open_journal: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compose, "ROUND", 32)
    run = replace(make_run("finetuned", prompts={"compose": 100}), prompts=[], vllm_urls=(author.url,))
    whole, _ = composed(run, open_journal(tmp_path / "whole", breaks_in="diagnose"))
    drawn = seeds(author)
    author.bodies.clear()
    with pytest.raises(ConnectionResetError):
        recover(run, open_journal(tmp_path / "killed", breaks_in="compose", breaks_at=40))
    assert 0 < len(seeds(author)) < len(drawn)
    texts, _ = composed(run, open_journal(tmp_path / "killed", breaks_in="diagnose"))
    assert texts == whole
    assert seeds(author) == drawn


def test_a_model_in_this_process_writes_the_same_for_a_seed(
    make_run: Callable[..., Run],
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    open_journal: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To one without any opinion all tokens are alike: few of its draws are prompts."""
    monkeypatch.setattr(compose, "MOST_DRAWS", 20)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run = make_run("finetuned", prompts={"compose": 80, "max_tokens": 40})
    run = replace(run, prompts=[], teacher=tmp_path / "teacher")
    state = torch.random.get_rng_state()
    first, counts = composed(run, open_journal(tmp_path / "first", breaks_in="diagnose"))
    assert torch.equal(state, torch.random.get_rng_state())
    again, _ = composed(run, open_journal(tmp_path / "again", breaks_in="diagnose"))
    assert first == again
    assert len(first) == counts.kept == 80
    assert {"unfinished", "marks_of_the_template"} <= counts.refused.keys()


def test_a_teacher_that_writes_too_few_is_an_error_that_says_why(
    author: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    author.sample = lambda _ids, seed: [9, 10, 11, 12 + seed % 3, END]
    run = replace(make_run("finetuned", prompts={"compose": 100}), prompts=[], vllm_urls=(author.url,))
    with pytest.raises(EmptyDataset, match=r"3 usable prompts in \d+ draws \(duplicate \d+\)"):
        recover(run, open_journal(tmp_path))
