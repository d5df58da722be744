"""Which tokens may be chosen, and by what penalties they are moved."""

from collections import Counter

import pytest
import torch

from recoup_ml.sampling import Sampling, choose

LOGITS_V = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def chosen(
    asked: Sampling, times: int = 400, prompt: tuple[int, ...] = (), said: tuple[int, ...] = ()
) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose(LOGITS_V, asked, prompt, said, generator) for _ in range(times))


def test_greedy_is_the_likeliest_token() -> None:
    assert chosen(Sampling(temperature=0.0)).keys() == {1}


def test_without_settings_tokens_come_as_often_as_they_are_likely() -> None:
    found = chosen(Sampling(), times=20_000)
    expected = LOGITS_V.softmax(-1).tolist()
    assert [found[token] / 20_000 for token in range(5)] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=3), {1, 2, 3}),
        (Sampling(top_p=0.6), {1}),
        (Sampling(top_p=0.7), {1, 2}),
        (Sampling(min_p=0.3), {1, 2}),
        (Sampling(top_p=1e-9), {1}),
        (Sampling(allowed_token_ids=[4]), {4}),
    ],
)
def test_only_the_likelier_tokens_are_left(asked: Sampling, allowed: set[int]) -> None:
    assert chosen(asked, times=2000).keys() == allowed


def test_what_was_said_often_is_said_less() -> None:
    assert chosen(Sampling(temperature=0.0, presence_penalty=1.5), said=(1,)).keys() == {2}
    assert chosen(Sampling(temperature=0.0, frequency_penalty=0.6), said=(1,)).keys() == {1}
    assert chosen(Sampling(temperature=0.0, frequency_penalty=0.6), said=(1, 1)).keys() == {2}
    assert chosen(Sampling(temperature=0.0, presence_penalty=1.5), prompt=(1,)).keys() == {1}
    assert chosen(Sampling(temperature=0.0, repetition_penalty=2.0), prompt=(1,)).keys() == {2}
