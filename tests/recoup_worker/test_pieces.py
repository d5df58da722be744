"""Where an answer ends, and what of it may be shown before that is known."""

import pytest

from recoup_ml.shelf import Token
from recoup_worker.pieces import Shape, pieces, usage_of


def tokens(*texts, ends=False):
    last = len(texts) - 1
    return iter(Token(text, at, -1.0, [], ends and at == last) for at, text in enumerate(texts))


def found(stops, most, *texts, ends=False):
    parts = [*pieces(tokens(*texts, ends=ends), stops, most)]
    return [part.text for part in parts], parts[-1].finish


def test_without_stop_texts_every_token_is_shown_at_once():
    assert found([], 9, "a", "b", "", ends=True) == (["a", "b", ""], "stop")
    assert found([], 2, "a", "b", "c") == (["a", "b"], "length")


@pytest.mark.parametrize(
    ("stops", "texts", "expected"),
    [
        (["."], ["a", "b.c", "d"], "ab"),
        (["END"], ["a", "E", "N", "D", "x"], "a"),
        (["END"], ["a", "EN", "x"], "aENx"),
        (["b", "a"], ["xab"], "x"),
    ],
)
def test_an_answer_ends_before_a_stop_text_however_it_comes(stops, texts, expected):
    shown, finish = found(stops, len(texts), *texts)
    assert "".join(shown) == expected
    assert finish == ("stop" if len(expected) < len("".join(texts)) else "length")


def test_what_may_begin_a_stop_text_is_held_back():
    parts = pieces(tokens("aE", "N", "x"), ["END"], 3)
    assert next(parts).text == ""
    assert next(parts).text == "a"
    assert next(parts).text == "ENx"


def test_tokens_are_counted_and_spelt():
    shape = Shape.of("text", "m", True, True, lambda id: f"t{id}")
    answer = [*pieces(tokens("a", "b"), [], 2)]
    told = shape.whole([answer], usage_of(3, [answer]))
    assert told["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert told["choices"][0]["token_ids"] == [0, 1]
    assert told["choices"][0]["logprobs"]["tokens"] == ["t0", "t1"]
    assert told["choices"][0]["logprobs"]["text_offset"] == [0, 2]
