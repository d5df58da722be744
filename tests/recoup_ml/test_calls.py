"""A function call is the same whatever the order, spacing and quotes, and another with any other value."""

import json
import random
import string
import time
from typing import Any

import pytest

from recoup_ml.calls import json_calls, keeps_calls, python_calls

WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "metric": true}}'
RIDE = 'uber.ride(loc="2020 Addison Street (rear)", type="plus", time=10)'
PAIR = '{"name": "add", "arguments": {"a": 1}}\n{"name": "add", "arguments": {"a": 2}}'


@pytest.mark.parametrize(
    "rewrite",
    [
        WEATHER,
        '{"arguments":{"metric":true,"days":3.0,"city":"Paris"},"name":"get_weather"}',
        f"I look that up.\n```json\n{json.dumps(json.loads(WEATHER), indent=4)}\n```",
        f"<tool_call>{WEATHER}</tool_call>",
        f"[{WEATHER}]",
        f"First {WEATHER} and, as said, {WEATHER}",
        json.dumps({"tool_calls": [{"type": "function", "function": json.loads(WEATHER)}]}),
        json.dumps({"name": "get_weather", "arguments": json.dumps(json.loads(WEATHER)["arguments"])}),
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3, "metric": true}}',
        '{"note": "no call"} {broken ' + WEATHER,
    ],
)
def test_a_json_call_survives_another_layout(rewrite: str) -> None:
    assert keeps_calls(rewrite, WEATHER)


@pytest.mark.parametrize(
    "rewrite",
    [
        "",
        "get_weather for Paris, 3 days",
        WEATHER.replace("Paris", "paris"),
        WEATHER.replace("3", "4"),
        WEATHER.replace("3", '"3"'),
        WEATHER.replace("true", "1"),
        WEATHER.replace("get_weather", "weather"),
        WEATHER.replace(', "metric": true', ""),
        WEATHER.replace("true}", 'true, "hour": 1}'),
        WEATHER.replace("}}", "}"),
        f"{WEATHER} {PAIR}",
        "get_weather(city='Paris', days=3, metric=True)",
    ],
)
def test_a_json_call_with_another_value_is_lost(rewrite: str) -> None:
    assert not keeps_calls(rewrite, WEATHER)


@pytest.mark.parametrize(
    "rewrite",
    [
        RIDE,
        "uber.ride( type = 'plus', time=10,\n  loc='2020 Addison Street (rear)' )",
        f"You can call `{RIDE}` for that (it is quick).",
        f"```python\n{RIDE}\n```",
    ],
)
def test_a_python_call_survives_another_layout(rewrite: str) -> None:
    assert keeps_calls(rewrite, RIDE)


@pytest.mark.parametrize(
    "rewrite",
    [
        "",
        "uber.ride",
        RIDE.replace("10", "11"),
        RIDE.replace("10", "'10'"),
        RIDE.replace("uber", "my.uber"),
        RIDE.removesuffix(")"),
        f"{RIDE} {RIDE.replace('10', '12')}",
        RIDE.replace("type=", ""),
    ],
)
def test_a_python_call_with_another_value_is_lost(rewrite: str) -> None:
    assert not keeps_calls(rewrite, RIDE)


@pytest.mark.parametrize("reference", [PAIR, "add(1)\nadd(2)", "[add(1), add(2)]", "add(1); add(2)"])
def test_all_of_several_calls_have_to_be_there_in_any_order(reference: str) -> None:
    halves = (PAIR if reference == PAIR else "add(1)\nadd(2)").split("\n")
    assert keeps_calls("\n".join(reversed(halves)), reference)
    assert not any(keeps_calls(half, reference) for half in halves)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris (France)",
        "print('hello')",
        "sorted(x)",
        "x = f(1)",
        "f(1) and more",
        "f(1",
        "f",
        "Call f(1).",
        "[]",
    ],
)
def test_other_texts_are_no_python_calls(text: str) -> None:
    assert python_calls(text) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "age": 3}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": }',
        '["name", "arguments"]',
        "{}",
    ],
)
def test_other_objects_are_no_json_calls(text: str) -> None:
    assert json_calls(text) == []


def test_what_looks_like_a_call_within_arguments_is_an_argument() -> None:
    inner = '{"name": "add", "arguments": {"a": 1}}'
    outer = f'{{"name": "later", "arguments": {{"task": {inner}}}}}'
    assert [name for name, _ in json_calls(outer)] == ["later"]
    assert not keeps_calls(inner, outer)


def any_value(draw: random.Random, depth: int = 3) -> Any:
    kind = draw.choice(["text", "number", "truth", "null", *["list", "object"] * (depth > 0)])
    size = draw.randint(0, 3)
    match kind:
        case "text":
            return "".join(draw.choices(string.printable + "äß🙂", k=5))
        case "number":
            return draw.choice([draw.randint(-(10**20), 10**20), draw.random()])
        case "truth":
            return draw.random() < 0.5
        case "list":
            return [any_value(draw, depth - 1) for _ in range(size)]
        case "object":
            return {f"key{n}": any_value(draw, depth - 1) for n in range(size)}
    return None


@pytest.mark.parametrize("seed", range(40))
def test_any_call_is_the_same_after_its_keys_are_shuffled_and_another_after_one_is_added(seed: int) -> None:
    draw = random.Random(seed)
    arguments = {f"key{n}": any_value(draw) for n in range(draw.randint(0, 6))}
    shuffled = dict(draw.sample(list(arguments.items()), len(arguments)))
    call = json.dumps({"name": "f", "arguments": arguments})
    assert keeps_calls(json.dumps({"arguments": shuffled, "name": "f"}, indent=2), call)
    assert not keeps_calls(json.dumps({"name": "f", "arguments": shuffled | {"more": None}}), call)


@pytest.mark.parametrize(
    "part",
    [
        "{",
        "[",
        '{"name":',
        '{"a":[',
        "f(",
        "add(",
        "add()",
        "add(1",
        ")",
        "(",
        '"',
        "\\",
        "-",
        "a.",
        "1+",
        '{"name": "f", "arguments": {',
    ],
)
@pytest.mark.parametrize("reference", [PAIR, "add(1)\nadd(2)"])
def test_no_text_takes_long_or_fails(part: str, reference: str) -> None:
    text = part * (200_000 // len(part))
    started = time.process_time()
    assert not keeps_calls(text, reference)
    assert not python_calls(text)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("depth", range(150, 1000, 50))
def test_arguments_of_any_depth_can_be_compared(depth: int) -> None:
    deep = '{"name": "f", "arguments": ' + "[" * depth + "]" * depth + "}"
    assert keeps_calls(deep, deep) in {True, False}
