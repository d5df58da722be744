"""Greedy answers from the model itself are the plain loop's."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Prompt
from recoup_ml import generate, models
from recoup_ml.errors import TeacherTruncated
from recoup_ml.generate import BATCH, LocalEngine, require_an_end, usable
from recoup_ml.kept_batches import KeptBatches
from recoup_ml.observation import observe
from recoup_ml.sequences import Answered, Encoded, encode, with_prompts

LIMIT = 12


def ignore(_done: int) -> None: ...


@pytest.fixture(scope="module")
def asked(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[Encoded]:
    return encode(prompts[:70], tokenizer, 512)


@torch.inference_mode()
def argmax_loop(model: PreTrainedModel, ids: tuple[int, ...], limit: int, end_ids: set[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in end_ids):
        logits_V = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1]
        answer.append(int(logits_V.argmax()))
    return answer


def test_answers_are_those_of_a_plain_loop(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    found = LocalEngine(healthy, tokenizer).answer(asked[:20], LIMIT, ignore)
    expected = [argmax_loop(healthy, prompt.ids, LIMIT, {2}) for prompt in asked[:20]]
    assert [list(answer.answer_ids) for answer in found] == expected


def test_padding_on_the_left_changes_no_answer(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    engine = LocalEngine(healthy, tokenizer)
    together = engine.answer(asked, LIMIT, ignore)
    assert len({len(prompt.ids) for prompt in asked}) > 2
    assert together == [engine.answer([prompt], LIMIT, ignore)[0] for prompt in asked]


def test_a_system_prompt_is_passed_once_a_batch_and_changes_no_answer(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    system = tuple(range(11, 23))
    begun = [Encoded(prompt.prompt, system + prompt.ids) for prompt in asked[:20]]
    widths: list[int] = []
    hook = (
        healthy.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _layer, args: widths.append(args[0].shape[1]))
    )
    found = LocalEngine(healthy, tokenizer).answer(begun, LIMIT, ignore)
    hook.remove()
    assert max(widths) < max(len(prompt.ids) for prompt in begun)
    expected = [argmax_loop(healthy, prompt.ids, LIMIT, {2}) for prompt in begun]
    assert [list(answer.answer_ids) for answer in found] == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("begin", [(), tuple(range(11, 23))], ids=["", "system"])
@pytest.mark.parametrize("shares", [False, True])
def test_a_model_is_observed_while_it_answers_as_on_the_text(
    shares: bool,
    begin: tuple[int, ...],
    whole: bool,
    healthy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Encoded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "can_share", lambda _model: shares)
    engine = LocalEngine(healthy, tokenizer)
    begun = [Encoded(prompt.prompt, begin + prompt.ids) for prompt in asked]
    answers, seen = engine.observed(begun, LIMIT, ignore, whole)
    texts = with_prompts(answers) if whole else answers
    again = observe(healthy, texts, models.pad_id(tokenizer))
    assert answers == usable(engine.answer(begun, LIMIT, ignore))
    assert [len(part) for part in seen.hidden] == [len(given.answer_ids) for given in texts]
    for found, expected in zip(seen.hidden, again.hidden, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_answer_says_how_it_ended(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    found = LocalEngine(healthy, tokenizer).answer(asked, 3, ignore)
    assert {answer.finish for answer in found} == {"stop", "length"}
    for prompt, answer in zip(asked, found, strict=True):
        assert (answer.answer_ids[-1] == tokenizer.eos_token_id) == (answer.finish == "stop")
        assert len(answer.answer_ids) <= 3
        assert (answer.prompt_ids, answer.prompt, answer.kind) == (prompt.ids, prompt.text, prompt.kind)
        assert answer.answer == tokenizer.decode(answer.answer_ids, skip_special_tokens=True)


def test_every_end_token_of_the_model_ends_an_answer(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    model = models.load(teacher)
    also = int(torch.tensor([argmax_loop(model, prompt.ids, 1, {2})[0] for prompt in asked]).mode().values)
    model.generation_config.eos_token_id = [2, also]
    found = LocalEngine(model, tokenizer).answer(asked, LIMIT, ignore)
    assert [list(answer.answer_ids) for answer in found] == [
        argmax_loop(model, prompt.ids, LIMIT, {2, also}) for prompt in asked
    ]
    assert any(answer.answer_ids == (also,) and answer.finish == "stop" for answer in found)


def test_a_model_that_samples_by_default_still_answers_greedily(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    model = models.load(teacher)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    found = LocalEngine(model, tokenizer).answer(asked[:8], LIMIT, ignore)
    assert [list(answer.answer_ids) for answer in found] == [
        argmax_loop(model, prompt.ids, LIMIT, {2}) for prompt in asked[:8]
    ]


def test_a_penalty_in_the_generation_config_does_not_bend_greedy_answers(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    """Qwen2.5 and others ship `repetition_penalty`; an answer under it is not what the teacher likes best."""
    model = models.load(teacher)
    model.generation_config.update(repetition_penalty=1.5)
    found = LocalEngine(model, tokenizer).answer(asked[:20], LIMIT, ignore)
    assert [list(answer.answer_ids) for answer in found] == [
        argmax_loop(model, prompt.ids, LIMIT, {2}) for prompt in asked[:20]
    ]


def test_no_prompts_have_no_answers(healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert LocalEngine(healthy, tokenizer).answer([], LIMIT, ignore) == []


def test_progress_counts_answers(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded]
) -> None:
    told: list[int] = []
    LocalEngine(healthy, tokenizer).answer(asked, 2, told.append)
    assert told == [BATCH, len(asked)]


def break_off(_done: int) -> None:
    raise ConnectionResetError


def test_batches_that_were_answered_before_a_crash_are_taken_as_they_were(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded], tmp_path: Path
) -> None:
    model, kept = models.load(teacher), KeptBatches(tmp_path)
    answers, seen = LocalEngine(model, tokenizer).observed(asked, LIMIT, ignore)
    engine = LocalEngine(model, tokenizer, kept=kept)
    with pytest.raises(ConnectionResetError):
        engine.observed(asked, LIMIT, break_off)
    (first,) = tmp_path.iterdir()
    written = first.stat().st_mtime_ns
    again, seen_again = engine.observed(asked, LIMIT, ignore)
    assert again == answers
    assert all(torch.equal(*pair) for pair in zip(seen_again.hidden, seen.hidden, strict=True))
    assert first.stat().st_mtime_ns == written
    assert len([*tmp_path.iterdir()]) == 2


def test_kept_batches_are_those_of_the_same_prompts_limit_and_wish(
    teacher: Path, tokenizer: PreTrainedTokenizerFast, asked: list[Encoded], tmp_path: Path
) -> None:
    model = models.load(teacher)
    plain, keeping = (LocalEngine(model, tokenizer, kept=kept) for kept in (None, KeptBatches(tmp_path)))
    for prompts, limit in ((asked, LIMIT), (asked[:50], LIMIT), (asked[::-1], LIMIT), (asked, 4)):
        assert keeping.answer(prompts, limit, ignore) == plain.answer(prompts, limit, ignore)
        assert keeping.observed(prompts, limit, ignore)[0] == usable(plain.answer(prompts, limit, ignore))


def answered(text: str) -> Answered:
    return Answered("", "", (1,), text, (2,), "stop")


def test_empty_answers_are_left_out() -> None:
    assert usable([answered("a"), answered(" \n"), answered("b")]) == [answered("a"), answered("b")]


def test_no_answer_at_all_is_an_error_that_says_so() -> None:
    with pytest.raises(TeacherTruncated, match="None of the teacher's 2 answers"):
        usable([answered(""), answered(" ")])


def test_answers_that_were_all_cut_are_refused_and_one_end_is_enough() -> None:
    cut = Answered("", "", (1,), "a", (2, 3), "length")
    with pytest.raises(TeacherTruncated, match=r"Every one of the teacher's 2 answers was cut at 7.*raise"):
        require_an_end([cut, cut], 7)
    require_an_end([cut, answered("a")], 7)
    require_an_end([], 7)
