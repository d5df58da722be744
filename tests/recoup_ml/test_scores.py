"""Scores of one model against its teacher, each against a plain computation."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup_ml import models, scores
from recoup_ml.observation import Observation, observe
from recoup_ml.scores import Scores, compare, greedy_share, matches, repetition, text_windows
from recoup_ml.sequences import Answered


@pytest.fixture(scope="module")
def teacher_seen(healthy: PreTrainedModel, answered: list[Answered]) -> Observation:
    return observe(healthy, answered, 0)


@pytest.fixture(scope="module")
def damaged(student: Callable[[str], Path]) -> PreTrainedModel:
    return models.load(student("finetuned"))


def test_the_teacher_agrees_with_itself_entirely(teacher_seen: Observation, answered: list[Answered]) -> None:
    scored = compare(teacher_seen, teacher_seen, answered)
    assert scored.mean_kl == 0
    assert {value for sequence in scored.kl for value in sequence} == {0.0}
    assert scored.agreement == [len(sequence.answer_ids) for sequence in answered]


@torch.inference_mode()
def test_scores_are_those_of_plain_forward_passes(
    healthy: PreTrainedModel, damaged: PreTrainedModel, teacher_seen: Observation, answered: list[Answered]
) -> None:
    scored = compare(teacher_seen, observe(damaged, answered, 0), answered)
    for row, sequence in enumerate(answered):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.answer_ids]])
        places = slice(len(sequence.prompt_ids) - 1, -1)
        log_p_AV, log_q_AV = (
            model(input_ids=ids).logits[0, places].double().log_softmax(-1) for model in (healthy, damaged)
        )
        expected = (log_p_AV.exp() * (log_p_AV - log_q_AV)).sum(-1)
        assert scored.kl[row] == pytest.approx(expected.tolist(), abs=1e-5)
        assert scored.agreement[row] == int((log_p_AV.argmax(-1) == log_q_AV.argmax(-1)).sum())
        nll = -sum(float(log_q_AV[at, token]) for at, token in enumerate(sequence.answer_ids))
        assert scored.nll[row] == pytest.approx(nll, abs=1e-3)
    assert scored.mean_kl == pytest.approx(
        sum(map(sum, scored.kl)) / sum(len(sequence.answer_ids) for sequence in answered)
    )


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_size_of_chunks_changes_nothing(
    chunk: int,
    damaged: PreTrainedModel,
    teacher_seen: Observation,
    answered: list[Answered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = observe(damaged, answered, 0)
    expected = compare(teacher_seen, seen, answered)
    monkeypatch.setattr(scores, "CHUNK", chunk)
    found = compare(teacher_seen, seen, answered)
    assert found.agreement == expected.agreement
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    for ours, theirs in zip(found.kl, expected.kl, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_greedy_answers_are_the_likeliest_tokens_of_who_gave_them(
    damaged: PreTrainedModel, teacher_seen: Observation, answered: list[Answered]
) -> None:
    assert greedy_share(teacher_seen, answered) == 1.0
    seen = observe(damaged, answered, 0)
    scored = compare(teacher_seen, seen, answered)
    tokens = sum(len(sequence.answer_ids) for sequence in answered)
    assert greedy_share(seen, answered) == sum(scored.agreement) / tokens < 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_value_that_is_not_finite_makes_the_mean_infinite(broken: float) -> None:
    assert Scores([[0.1, 0.2], [broken]], [2, 1], [[1.0], [1.0]]).mean_kl == math.inf


@torch.inference_mode()
def test_bits_of_natural_text_are_those_of_plain_forward_passes(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, natural_text: list[str]
) -> None:
    windows = text_windows(natural_text, tokenizer, 24, 20)
    found = scores.natural_text(healthy, tokenizer, windows)
    assert len(found) == 20
    for window, ids in zip(found, windows, strict=True):
        log_p_TV = healthy(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        bits = -sum(float(log_p_TV[at, token]) for at, token in enumerate(ids[1:])) / math.log(2)
        assert window.bits == pytest.approx(bits, rel=1e-4)
        assert window.characters == len(tokenizer.decode(ids[1:]))


def test_windows_are_spread_over_all_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(["red"] * 50 + ["blue"] * 50)
    windows = text_windows([text], tokenizer, 10, 5)
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    assert windows == [(red,) * 10] * 3 + [(blue,) * 10] * 2


def test_a_short_text_gives_fewer_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(text_windows([" ".join(["red"] * 29)], tokenizer, 10, 5)) == 2
    assert text_windows(["red"], tokenizer, 10, 5) == []


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7] * 8, 4 / 5),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3], 0.0),
        ([], 0.0),
    ],
)
def test_repetition_is_the_share_of_grams_seen_before(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_a_match_forgives_white_space_at_the_ends_and_nothing_else() -> None:
    answers = [" billing\n", "Billing", "billing.", "billing"]
    assert matches(answers, ["billing"] * 4) == [True, False, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_is_compared_with_a_teacher_from_a_file(
    healthy: PreTrainedModel, teacher: Path, answered: list[Answered], tmp_path: Path
) -> None:
    observe(healthy, answered, 0).save(tmp_path / "teacher.safetensors")
    seen = observe(models.load(teacher).cuda().float(), answered, 0)
    assert compare(Observation.load(tmp_path / "teacher.safetensors"), seen, answered).mean_kl < 1e-4
