"""A real vLLM answers as transformers does, where RECOUP_TEST_VLLM_PYTHON names an environment of it."""

import asyncio
import copy
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Message, Prompt
from recoup_jobs.settings import Settings
from recoup_ml.errors import RolloutMismatch, TeacherLogProbsTooFew
from recoup_ml.generate import LocalEngine
from recoup_ml.mismatch import Mismatch
from recoup_ml.observation import observe
from recoup_ml.sequences import encode
from recoup_ml.served_student import ServedStudent, drifted
from recoup_ml.vllm_engine import Generator, Patience, Question, Row, Sampling, VllmEngine
from recoup_server.teacher import Teacher, find_build, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        "RECOUP_TEST_VLLM_PYTHON" not in os.environ,
        reason="RECOUP_TEST_VLLM_PYTHON names no environment of vLLM (deploy/vllm/environment.sh)",
    ),
]
LIMIT = 16


@pytest.fixture(scope="module")
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Untrained, with heads as wide as vLLM's kernels want them."""
    return make_model(layers=2, hidden_size=128, num_attention_heads=4).eval()


@pytest.fixture(scope="module")
def url(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: int,
) -> Iterator[str]:
    home = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(home / "tiny")
    tokenizer.save_pretrained(home / "tiny")
    asked = Teacher(home / "tiny", "127.0.0.1", free_port, 256, ())
    build = find_build(Path(os.environ["RECOUP_TEST_VLLM_PYTHON"]))
    with running(asked, build, Settings(home=home)):
        yield asked.url


@pytest.fixture(scope="module")
def student_url(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Of the same model, with room for adapters."""
    home = tmp_path_factory.mktemp("student")
    model.save_pretrained(home / "tiny")
    tokenizer.save_pretrained(home / "tiny")
    flags = ("--enable-lora", "--max-lora-rank", "16")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    build = find_build(Path(os.environ["RECOUP_TEST_VLLM_PYTHON"]))
    with running(Teacher(home / "tiny", "127.0.0.1", port, 256, flags), build, Settings(home=home)):
        yield f"http://127.0.0.1:{port}"


def rows_of(url: str, questions: list[Question], sampling: Sampling) -> list[Row]:
    async def collect() -> list[Row]:
        rows = Generator([url], Patience()).rows(questions, sampling)
        return sorted([row async for row in rows], key=lambda row: (row.place, row.sample))

    return asyncio.run(collect())


def test_greedy_answers_are_those_of_transformers(
    url: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    items = encode(prompts[:40], tokenizer, 128)
    served = VllmEngine([url], tokenizer).answer(items, LIMIT, lambda _done: None)
    local = LocalEngine(model, tokenizer).answer(items, LIMIT, lambda _done: None)
    assert sum(mine == theirs for mine, theirs in zip(served, local, strict=True)) >= 39


def test_the_likeliest_tokens_are_those_of_transformers_generated_or_given(
    url: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    """In float32; half of the vocabulary, so that places are swapped where two are all but equally likely."""
    engine, found = VllmEngine([url], tokenizer), {}
    items, k = encode(prompts[:20], tokenizer, 128), len(tokenizer) // 2
    engine.each(items, LIMIT, k, lambda place, answer, top: found.update({place: (answer, top)}))
    answers = [found[place][0] for place in range(20)]
    given = [replace(answer, answer_ids=answer.answer_ids[::-1]) for answer in answers]
    for asked, told in (
        (answers, [found[place][1] for place in range(20)]),
        (given, engine.tops(given, k)),
    ):
        seen = observe(model, asked, 0)
        for top, hidden_ND in zip(told, seen.hidden, strict=True):
            log_p_NV = seen.head(hidden_ND).log_softmax(-1)
            own_NK = log_p_NV.gather(-1, top.ids_NK.long())
            torch.testing.assert_close(top.log_p_NK.float(), own_NK, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(top.log_p_NK.float(), log_p_NV.topk(k).values, rtol=1e-3, atol=2e-4)
            rest_N = 1 - own_NK.exp().sum(-1)
            torch.testing.assert_close(top.log_rest_N.float().exp(), rest_N, rtol=1e-3, atol=1e-4)


def test_a_server_that_was_told_to_tell_fewer_says_so(
    url: str, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    """Through the generator, for `VllmEngine` asks for no more than there are."""
    (item,) = encode(prompts[:1], tokenizer, 128)
    with pytest.raises(TeacherLogProbsTooFew, match="--max-logprobs"):
        rows_of(url, [Question(0, item.ids)], Sampling(LIMIT, top_k=4097))


def test_a_student_with_its_adapter_of_the_moment_draws_there_as_here(
    student_url: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    """With two adapters, one after the other, each far from the model without."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainee = get_peft_model(copy.deepcopy(model), config)
    served = ServedStudent([student_url], tmp_path, tokenizer)
    items, told = encode(prompts[:8], tokenizer, 128), []
    for scale in (1.0, -3.0):
        for name, weight in trainee.named_parameters():
            weight.data.mul_(scale if "lora_B" in name else 1.0)
        served.publish(trainee.save_pretrained)
        given = served.answer(items, LIMIT, seed=3)
        seen = observe(trainee.get_base_model(), [answer for answer, _ in given], 0)
        told.append(Mismatch.of(answer.drift for answer in drifted(given, seen)))
        with pytest.raises(RolloutMismatch):
            drifted(given, observe(model, [answer for answer, _ in given], 0))
    served.withdraw()
    listed = [card["id"] for card in httpx2.get(f"{student_url}/v1/models").json()["data"]]
    assert listed == ["tiny"]
    assert all(found.mean < 1e-4 for found in told)


def test_samples_differ_from_one_another_and_are_the_same_the_next_time(
    url: str, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    (item,) = encode(prompts[:1], tokenizer, 128)
    sampling = Sampling(LIMIT, temperature=1.0, samples=4)
    first = rows_of(url, [Question(0, item.ids)], sampling)
    assert len({row.ids for row in first}) > 1
    again = rows_of(url, [Question(5, item.ids)], sampling)
    assert [row.ids for row in again] == [row.ids for row in first]


def test_a_text_ends_an_answer(url: str, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> None:
    (item,) = encode(prompts[:1], tokenizer, 128)
    (whole,) = rows_of(url, [Question(0, item.ids)], Sampling(LIMIT))
    word = whole.text.split()[3]
    (ended,) = rows_of(url, [Question(0, item.ids)], Sampling(LIMIT, stop=(word,)))
    assert ended.finish == "stop"
    assert word not in ended.text
    assert whole.text.startswith(ended.text.rstrip())


def test_a_conversation_is_answered_as_its_token_ids_are(
    url: str, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    messages: list[tuple[Message, ...]] = [tuple(prompt.messages) for prompt in prompts[:4]]
    chat = rows_of(url, [Question(at, said) for at, said in enumerate(messages)], Sampling(LIMIT))
    items = encode(prompts[:4], tokenizer, 128)
    plain = rows_of(url, [Question(at, item.ids) for at, item in enumerate(items)], Sampling(LIMIT))
    assert [row.ids for row in chat] == [row.ids for row in plain]
