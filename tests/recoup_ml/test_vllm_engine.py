"""What is asked of vLLM, what its answers become, and what is said when there is none.

The servers are real ones on loopback that behave as vLLM does; how several of them share the work stands
in `test_replicas.py`.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Message, Prompt
from recoup_ml.errors import TeacherContextTooShort, TeacherLogProbsTooFew, TeacherUnavailable
from recoup_ml.lessons import distributions
from recoup_ml.observation import observe
from recoup_ml.sequences import Answered, Encoded, encode
from recoup_ml.targets import TopK
from recoup_ml.vllm_engine import LOOKAHEAD, Generator, Patience, Question, Row, Sampling, VllmEngine
from recoup_ml.window import FIRST

LIMIT = 12
HASTY = Patience(answer=5.0, tries=2, outage=0.5)


def ignore(_done: int) -> None: ...


def rows_of(generator: Generator, questions: Any, sampling: Sampling) -> list[Row]:
    async def collect() -> list[Row]:
        return [row async for row in generator.rows(questions, sampling)]

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def asked(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[Encoded]:
    return encode(prompts[:70], tokenizer, 512)


def test_answers_come_in_the_order_of_the_prompts(
    server: Any, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    found = VllmEngine([server.url], tokenizer).answer(asked, LIMIT, ignore)
    assert [answer.answer_ids for answer in found] == [(*prompt.ids[-4:], 2) for prompt in asked]
    for prompt, answer in zip(asked, found, strict=True):
        assert (answer.prompt_ids, answer.prompt, answer.kind) == (prompt.ids, prompt.text, prompt.kind)
        assert answer.answer == tokenizer.decode(prompt.ids[-4:], skip_special_tokens=True)
        assert answer.finish == "stop"


def test_every_prompt_is_asked_once_greedily_on_its_token_ids(
    server: Any, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    told: list[int] = []
    VllmEngine([server.url + "/"], tokenizer).answer(asked, 3, told.append)
    assert sorted(body["prompt"] for body in server.bodies) == sorted(list(prompt.ids) for prompt in asked)
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("teacher", 0.0, 3)
        assert (body["repetition_penalty"], body["stop_token_ids"]) == (1.0, [tokenizer.eos_token_id])
        assert body["return_token_ids"] is True
        assert "seed" not in body
    assert told == [*range(1, len(asked) + 1)]


def test_no_prompts_have_no_answers(server: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert VllmEngine([server.url], tokenizer).answer([], LIMIT, ignore) == []


def test_prompts_with_the_same_beginning_are_asked_one_after_another(server: Any) -> None:
    server.reply = lambda answer: answer
    questions = [Question(place, (place % 3, 7, place)) for place in range(LOOKAHEAD // 64)]
    generator = Generator([server.url], HASTY)
    generator._windows[server.url].limit = 1
    rows_of(generator, questions[:9], Sampling(4))
    assert [body["prompt"][0] for body in server.bodies] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_questions_are_taken_no_faster_than_they_are_answered(server: Any) -> None:
    """A million prompts need no more memory than a few thousand."""
    taken = 0

    def endless() -> Iterator[Question]:
        nonlocal taken
        while True:
            taken += 1
            yield Question(taken, (1, taken % 96))

    async def some() -> list[Row]:
        rows = Generator([server.url], HASTY).rows(endless(), Sampling(2))
        found = [await anext(rows) for _ in range(50)]
        await rows.aclose()
        return found

    assert len({row.place for row in asyncio.run(some())}) == 50
    assert taken == LOOKAHEAD


def test_the_last_questions_do_not_narrow_what_was_found(server: Any) -> None:
    generator = Generator([server.url], HASTY)
    for _ in range(20):
        rows_of(generator, [Question(place, (5, place)) for place in range(FIRST // 2)], Sampling(3))
    assert generator._windows[server.url].limit == FIRST


def test_every_sample_of_a_question_is_a_row(server: Any) -> None:
    questions = [Question(place, (5, place)) for place in range(20)]
    found = rows_of(Generator([server.url], HASTY), questions, Sampling(3, temperature=0.7, samples=3))
    assert sorted((row.place, row.sample) for row in found) == [
        (place, sample) for place in range(20) for sample in range(3)
    ]


def test_a_question_has_the_same_seed_wherever_it_stands_and_another_seed_another(server: Any) -> None:
    def seeds(places: range, seed: int) -> dict[tuple[int, ...], int]:
        server.bodies.clear()
        questions = [Question(place, (5, place % 4)) for place in places]
        rows_of(Generator([server.url], HASTY), questions, Sampling(3, temperature=0.7, seed=seed))
        return {tuple(body["prompt"]): body["seed"] for body in server.bodies}

    first = seeds(range(4), 0)
    assert len(set(first.values())) == 4
    assert seeds(range(4, 8), 0) == first
    assert not set(seeds(range(4), 1).values()) & set(first.values())


def test_settings_of_sampling_are_sent(server: Any) -> None:
    sampling = Sampling(9, temperature=0.5, top_p=0.9, samples=2, stop=("\n",), stop_ids=(3,))
    rows_of(Generator([server.url], HASTY), [Question(0, (1, 2))], sampling)
    sent = server.bodies[0]
    assert [sent[name] for name in ("max_tokens", "temperature", "top_p", "n", "stop", "stop_token_ids")] == [
        *(9, 0.5, 0.9, 2, ["\n"], [3])
    ]


def test_a_conversation_is_asked_as_a_chat(server: Any) -> None:
    messages = (Message(role="system", content="be brief"), Message(role="user", content="why"))
    found = rows_of(Generator([server.url], HASTY), [Question(7, messages)], Sampling(5))
    assert [(row.place, row.text) for row in found] == [(7, "be brief why")]
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why"},
    ]


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_before_it_is_sent(server: Any) -> None:
    server.models = [{"id": "teacher", "max_model_len": 10}]
    generator = Generator([server.url], HASTY)
    assert rows_of(generator, [Question(0, (1,) * 6)], Sampling(4))
    with pytest.raises(TeacherContextTooShort, match=r"takes 10 tokens.*prompt of 7.*--max-model-len"):
        rows_of(generator, [Question(0, (1,) * 7)], Sampling(4))
    assert len(server.bodies) == 1


def edited(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def reply(answer: dict[str, Any]) -> dict[str, Any]:
        edit(answer)
        return answer

    return reply


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            edited(lambda answer: answer["choices"].append(answer["choices"][0])),
            "1 answers were asked for, and 2",
        ),
        (edited(lambda answer: answer["choices"][0].pop("token_ids")), "lacks 'token_ids'"),
        (edited(lambda answer: answer["choices"].clear()), "and 0 came"),
        (edited(lambda answer: answer["choices"][0].update(finish_reason="abort")), "ended by 'abort'"),
        (lambda _: {"error": "no"}, "lacks 'choices'"),
        (lambda _: b"<html>Bad Gateway</html>", "no JSON object: <html>"),
        (lambda _: b"[]", "lacks 'choices'"),
    ],
    ids=["one answer twice", "no token ids", "no answers", "aborted", "no choices", "no JSON", "a list"],
)
def test_nonsense_is_an_unavailable_teacher_and_the_error_says_what_came(
    reply: Callable[[dict[str, Any]], Any], sentence: str, server: Any
) -> None:
    server.reply = reply
    with pytest.raises(
        TeacherUnavailable, match=f"(?s)does not answer /v1/completions.*{sentence}.*RECOUP_VLLM_URLS"
    ):
        rows_of(Generator([server.url], HASTY), [Question(0, (1, 2))], Sampling(4))
    assert len(server.bodies) == HASTY.tries


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_request_that_the_server_will_never_take_is_not_repeated(
    status: int, server: Any, refusal: type
) -> None:
    server.reply = lambda _: refusal(status)
    with pytest.raises(TeacherUnavailable, match=f"does not answer /v1/completions: {status}"):
        rows_of(Generator([server.url], HASTY), [Question(0, (1, 2))], Sampling(4))
    assert len(server.bodies) == 1


def of_the_teacher(healthy: PreTrainedModel, answers: list[Answered], k: int) -> list[TopK]:
    return distributions(answers, observe(healthy, answers, 0), k, 1.0).targets


def assert_same(found: list[TopK], expected: list[TopK]) -> None:
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.ids_NK.tolist() == theirs.ids_NK.tolist()
        torch.testing.assert_close(mine.log_p_NK, theirs.log_p_NK, rtol=2e-3, atol=1e-4)
        assert mine.log_rest_N.dtype == torch.float16
        torch.testing.assert_close(
            mine.log_rest_N.float().exp(), theirs.log_rest_N.float().exp(), rtol=1e-2, atol=1e-6
        )


def test_what_is_likely_comes_with_the_answers(
    knowing: Any, healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    found: dict[int, tuple[Answered, TopK]] = {}
    VllmEngine([knowing.url], tokenizer).each(
        asked[:9], LIMIT, 6, lambda place, answer, top: found.update({place: (answer, top)})
    )
    answers = [found[place][0] for place in range(9)]
    assert_same([found[place][1] for place in range(9)], of_the_teacher(healthy, answers, 6))
    assert all(body["logprobs"] == 6 and "prompt_logprobs" not in body for body in knowing.bodies)


def test_a_given_answer_is_scored_at_every_position_in_one_request_no_longer_than_it(
    knowing: Any, healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, answered: list[Answered]
) -> None:
    """Answers that the teacher would not give: their tokens are told too, and are not its top."""
    given = [replace(item, answer_ids=item.answer_ids[::-1]) for item in answered[:9]]
    given.append(replace(answered[9], answer_ids=answered[9].answer_ids[:1]))
    assert_same(VllmEngine([knowing.url], tokenizer).tops(given, 6), of_the_teacher(healthy, given, 6))
    asked = sorted(len(body["prompt"]) + body["max_tokens"] for body in knowing.bodies)
    assert asked == sorted(map(len, given))


def test_no_more_is_asked_for_than_there_are_tokens(
    knowing: Any, tokenizer: PreTrainedTokenizerFast, answered: list[Answered]
) -> None:
    (top,) = VllmEngine([knowing.url], tokenizer).tops(answered[:1], 4096)
    assert top.ids_NK.shape[-1] == knowing.bodies[0]["logprobs"] == len(tokenizer)


def test_a_server_that_tells_too_few_is_an_error_that_says_what_to_do(
    server: Any, tokenizer: PreTrainedTokenizerFast, answered: list[Answered], refusal: type
) -> None:
    words = "Requested prompt logprobs of 64, which is greater than max allowed: 20"
    server.reply = lambda _: refusal(400, words=words)
    server.log_p = lambda ids: torch.zeros(len(ids), 99)
    with pytest.raises(TeacherLogProbsTooFew, match=r"does not tell 64 log-prob.*--max-logprobs"):
        VllmEngine([server.url], tokenizer, HASTY).tops(answered[:1], 64)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda choice: choice["logprobs"]["top_logprobs"].pop(), "0 positions of 1"),
        (lambda choice: choice.pop("logprobs"), "lacks 'logprobs'"),
        (lambda choice: choice["logprobs"]["top_logprobs"][0].popitem(), "5 at a position where 6"),
    ],
    ids=["a position less", "none at all", "a token less"],
)
def test_an_answer_without_all_of_its_log_probabilities_is_asked_for_again(
    edit: Callable[[dict[str, Any]], None],
    sentence: str,
    knowing: Any,
    tokenizer: PreTrainedTokenizerFast,
    answered: list[Answered],
) -> None:
    knowing.reply = edited(lambda answer: edit(answer["choices"][0]))
    sure = replace(answered[0], answer_ids=answered[0].answer_ids[:1])  # its token is the likeliest
    with pytest.raises(TeacherUnavailable, match=sentence):
        VllmEngine([knowing.url], tokenizer, HASTY).tops([sure], 6)
    assert len(knowing.bodies) == HASTY.tries


def test_a_server_without_a_model_is_an_unavailable_teacher(
    server: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    server.models = []
    with pytest.raises(TeacherUnavailable, match="serves no model"):
        VllmEngine([server.url], tokenizer)


def test_a_server_that_is_gone_is_an_unavailable_teacher(
    server: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    server.die()
    with pytest.raises(TeacherUnavailable, match="Check RECOUP_VLLM_URLS"):
        VllmEngine([server.url], tokenizer)
    server.live()


def test_a_server_that_is_too_slow_is_an_unavailable_teacher(
    server: Any, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    late = threading.Event()
    server.reply = lambda answer: (late.wait(5) and answer) or answer
    engine = VllmEngine([server.url], tokenizer, Patience(answer=0.2, tries=2))
    with pytest.raises(TeacherUnavailable, match="ReadTimeout"):
        engine.answer(asked[:2], LIMIT, ignore)
    late.set()
